"""The kernels that the TensorRT plugin of PredictedScores runs."""

from trt_kv.plugins.registry import device_kernel, kernel
from trt_kv.plugins.tensorrt_memory import PluginKernels

KERNELS = PluginKernels(host=kernel("PredictedScores", "cpu"), device=device_kernel("PredictedScores"))
