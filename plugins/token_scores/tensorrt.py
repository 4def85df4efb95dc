"""What the TensorRT plugin of TokenScores runs."""

from trt_kv.plugins.token_scores.cpu import run
from trt_kv.plugins.tensorrt_memory import PluginKernels

KERNELS = PluginKernels(host=run)
