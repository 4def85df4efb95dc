"""The CPU backend: dense layers in ONNX Runtime or torch, KV ops as numpy and numba kernels."""
