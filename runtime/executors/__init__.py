"""Ways to run the dense parts of a decoder; the KV ops between them always run on trt-kv's own kernels."""
