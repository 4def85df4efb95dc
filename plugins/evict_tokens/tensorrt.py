"""What the TensorRT plugin of EvictTokens runs."""

from trt_kv.plugins.evict_tokens.cpu import run
from trt_kv.plugins.tensorrt_memory import PluginKernels

KERNELS = PluginKernels(host=run)
