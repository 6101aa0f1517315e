"""The definition: float32 PyTorch, one page and head at a time, obvious and slow. Every backend is held against it."""
