"""Short measurements of this machine, for advice on engines that need not exist yet. ``python -m trt_kv.runtime.probes``."""
