"""What the TensorRT plugin of RecallAttention runs."""

from trt_kv.plugins.recall_attention.cpu import run
from trt_kv.plugins.registry import device_kernel
from trt_kv.plugins.tensorrt_memory import PluginKernels

KERNELS = PluginKernels(host=run, device=device_kernel("RecallAttention"))
