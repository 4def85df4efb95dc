"""The op CachedAttention: spec, reference, ONNX node and kernels."""
