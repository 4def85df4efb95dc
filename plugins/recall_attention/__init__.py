"""The op RecallAttention: spec, reference, ONNX node and kernels."""
