"""What the TensorRT plugin of TokenScores runs."""

from trt_kv.plugins.registry import device_kernel
from trt_kv.plugins.tensorrt_memory import PluginKernels
from trt_kv.plugins.token_scores.cpu import run

KERNELS = PluginKernels(host=run, device=device_kernel("TokenScores"))
