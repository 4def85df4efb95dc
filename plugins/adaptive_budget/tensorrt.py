"""The kernels that the TensorRT plugin of AdaptiveBudget runs."""

from trt_kv.plugins.registry import device_kernel, kernel
from trt_kv.plugins.tensorrt_memory import PluginKernels

KERNELS = PluginKernels(host=kernel("AdaptiveBudget", "cpu"), device=device_kernel("AdaptiveBudget"))
