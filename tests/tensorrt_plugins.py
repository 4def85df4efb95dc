"""TensorRT's plugins without a GPU: everything but the launch. Nothing here needs TensorRT before it is called."""

import ctypes

import numpy as np

from trt_kv.plugins.tensorrt_memory import Buffer, PluginCall, PluginKernels


def deregister_plugins() -> None:
    """Take the creators back: graphs are parsed without plugins from here on."""
    from trt_kv.plugins import tensorrt_base

    for creator in tensorrt_base._registered.values():
        tensorrt_base.trt.get_plugin_registry().deregister_creator(creator)
    tensorrt_base._registered.clear()


class HostMemory:
    """Buffers in ordinary memory, fp32."""

    def run(self, call: PluginCall, kernels: PluginKernels) -> None:
        tensors = {name: host_array(buffer) for name, buffer in call.inputs.items()}
        outputs = {name: host_array(buffer) for name, buffer in call.outputs.items()}
        for state in call.moved_states:
            outputs[f"{state}_out"][...] = tensors[state]
        tensors |= {state.name: outputs[f"{state.name}_out"] for state in call.spec.states}
        results = kernels.host(**tensors, **call.attributes)
        for output, result in zip(call.spec.outputs, results, strict=True):
            outputs[output.name][...] = result


def host_array(buffer: Buffer) -> np.ndarray:
    """The buffer as a numpy array that shares its memory."""
    n_bytes = int(np.prod(buffer.shape, dtype=np.int64)) * np.dtype(buffer.dtype).itemsize
    if not n_bytes:
        return np.empty(buffer.shape, buffer.dtype)
    memory = memoryview((ctypes.c_byte * n_bytes).from_address(buffer.pointer))
    return np.frombuffer(memory, buffer.dtype).reshape(buffer.shape)
