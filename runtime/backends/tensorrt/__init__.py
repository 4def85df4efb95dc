"""A TensorRT plan: whole steps in one engine, KV ops as plugins."""
