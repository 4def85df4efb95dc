"""The TensorRT backend: a plan that runs whole steps, with the KV ops as plugins."""
