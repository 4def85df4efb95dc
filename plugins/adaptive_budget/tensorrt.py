"""What the TensorRT plugin of AdaptiveBudget runs."""

from trt_kv.plugins.adaptive_budget.cpu import run
from trt_kv.plugins.registry import device_kernel
from trt_kv.plugins.tensorrt_memory import PluginKernels

KERNELS = PluginKernels(host=run, device=device_kernel("AdaptiveBudget"))
