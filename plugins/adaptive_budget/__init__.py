"""The op AdaptiveBudget: spec, reference, ONNX node and kernels."""
