"""An NVIDIA GPU: dense parts by torch or ONNX Runtime, KV ops by Triton kernels."""
