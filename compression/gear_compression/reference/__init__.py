"""The definition: float32 PyTorch, one page and one head at a time, obvious and slow. Every backend is held against it."""
