"""The CPU: dense parts by ONNX Runtime or torch, KV ops by numpy and numba kernels."""
