"""trt-kv: engines whose attention keeps, drops or pages the KV cache by policy.

The modules at this level define errors, configs, policies, and the recipe and manifest formats. Except for ``decoder``, which
imports torch, they import nothing heavy.
"""

__version__ = "0.1.0"
