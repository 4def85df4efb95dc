"""The backend for NVIDIA GPUs: dense layers in torch or ONNX Runtime, KV ops as Triton kernels."""
