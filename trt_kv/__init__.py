"""trt-kv: engines whose attention keeps, drops or pages the KV cache by policy.

This top level is the vocabulary (errors, configs, policies, recipe and manifest formats) and imports nothing heavy.
"""

__version__ = "0.1.0"
