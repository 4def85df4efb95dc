"""The buffers of a plugin's enqueue as tensors: raw pointers, shapes and types become arguments of the op's kernels."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from trt_kv.opspec import AttributeValue, OpSpec
from trt_kv.plugins.registry import Kernel


@dataclass(frozen=True, kw_only=True)
class PluginKernels:
    """Kernels of a plugin. ``host`` takes numpy arrays; ``device`` takes torch tensors on the GPU and launches on torch's
    current stream without waiting for it. Both have the signature that ``Kernel`` describes.
    """

    host: Kernel
    device: Kernel | None = None


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """One tensor of an enqueue: contiguous, row-major; ``dtype`` is a numpy name or "bfloat16"."""

    pointer: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class PluginCall:
    """One enqueue: the op, its attributes, and its buffers by the names of the spec (``kv_out`` is the updated ``kv``)."""

    spec: OpSpec
    attributes: Mapping[str, AttributeValue]
    inputs: Mapping[str, Buffer]
    outputs: Mapping[str, Buffer]
    stream: int

    @property
    def moved_states(self) -> tuple[str, ...]:
        """States whose output is not at the address of the input: they are copied before the op runs."""
        names = (state.name for state in self.spec.states)
        return tuple(name for name in names if self.inputs[name].pointer != self.outputs[f"{name}_out"].pointer)


class Memory(Protocol):
    """The kind of memory that holds the buffers of a call, and how kernels run on them."""

    def run(self, call: PluginCall, kernels: PluginKernels) -> None:
        """Fill the call's outputs. A state whose output is elsewhere is copied first; any other state is updated in place."""
        ...


class CudaMemory:
    """Buffers on a GPU, through torch. Without a device kernel the op runs on the host, which is correct and slow."""

    def run(self, call: PluginCall, kernels: PluginKernels) -> None:
        import torch

        with torch.cuda.stream(torch.cuda.ExternalStream(call.stream)):
            tensors = {name: cuda_tensor(buffer) for name, buffer in call.inputs.items()}
            outputs = {name: cuda_tensor(buffer) for name, buffer in call.outputs.items()}
            for state in call.moved_states:
                outputs[f"{state}_out"].copy_(tensors[state], non_blocking=True)
            tensors |= {state.name: outputs[f"{state.name}_out"] for state in call.spec.states}
            if kernels.device is None:
                results = _staged(call, kernels.host, tensors)
            else:
                results = kernels.device(**tensors, **call.attributes)
            for output, result in zip(call.spec.outputs, results, strict=True):
                outputs[output.name].copy_(result, non_blocking=kernels.device is not None)


def cuda_tensor(buffer: Buffer) -> Any:
    """The buffer as a torch tensor on the current device that shares its memory."""
    import torch

    typestr = {"float32": "<f4", "int64": "<i8", "float16": "<f2", "bfloat16": "<i2"}[buffer.dtype]
    interface = {"shape": buffer.shape, "typestr": typestr, "data": (buffer.pointer, False), "version": 3}
    tensor = torch.as_tensor(_Exported(interface), device="cuda")
    return tensor.view(torch.bfloat16) if buffer.dtype == "bfloat16" else tensor


class _Exported:
    """An object with the CUDA array interface, which torch reads without a copy."""

    def __init__(self, interface: Mapping[str, Any]) -> None:
        self.__cuda_array_interface__ = interface


def _staged(call: PluginCall, run: Kernel, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
    """Run a host kernel on copies, and copy the states back."""
    import torch

    host = {name: (t.float() if t.is_floating_point() else t).cpu().numpy() for name, t in tensors.items()}
    results = run(**host, **call.attributes)
    for state in call.spec.states:
        tensors[state.name].copy_(torch.from_numpy(host[state.name]))
    return tuple(torch.from_numpy(np.ascontiguousarray(result)) for result in results)
