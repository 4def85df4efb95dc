"""The op TokenScores: spec, reference, ONNX node and kernels."""
