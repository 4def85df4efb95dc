"""The kernels that the TensorRT plugin of RecallAttention runs."""

from trt_kv.plugins.registry import device_kernel, kernel
from trt_kv.plugins.tensorrt_memory import PluginKernels

KERNELS = PluginKernels(host=kernel("RecallAttention", "cpu"), device=device_kernel("RecallAttention"))
