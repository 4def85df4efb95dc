"""The op EvictTokens: spec, reference, ONNX node and kernels."""
