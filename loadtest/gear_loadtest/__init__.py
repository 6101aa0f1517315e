"""A load generator for any OpenAI-compatible server: it speaks HTTP and imports nothing else of GearServe."""
