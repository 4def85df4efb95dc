"""Launching a Triton kernel, or recording the launch instead: compile tests and tables need no GPU and no list of kernels."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
}
OPTIONS = {"enable_fp_fusion": True}
"""Compile options of every kernel, whatever Triton's defaults are: multiply-adds are fused (rounded once)."""
_PROCESSORS_WITHOUT_GPU = 132
"""Streaming multiprocessors that launches are planned for if tensors are on no GPU: those of a large one."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The part of a launch that determines what is compiled: argument types, compile-time constants, options."""

    kernel: Any
    signature: Mapping[str, str]
    constants: Mapping[str, int]
    aligned: tuple[str, ...]
    warps: int
    stages: int

    @property
    def name(self) -> str:
        name: str = self.kernel.__name__
        return name

    @property
    def key(self) -> tuple[Any, ...]:
        """Key that is equal for launches that compile to the same code."""
        return self.name, *self.signature.items(), *self.constants.items(), self.aligned, self.warps, self.stages


_recorded: ContextVar[list[Launch] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Context in which launches are appended to the list instead of executed. Tensors may be on the device "meta"."""
    launches: list[Launch] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)


def launch(kernel: Any, grid: tuple[int, ...], *, warps: int = 4, stages: int = 2, **arguments: Any) -> None:
    """Launch ``kernel`` on torch's current stream, arguments by name. A grid without programs launches nothing."""
    if 0 in grid:
        return
    launches = _recorded.get()
    if launches is None:
        kernel[grid](**arguments, num_warps=warps, num_stages=stages, **OPTIONS)
    else:
        launches.append(_launch_of(kernel, arguments, warps, stages))


def _launch_of(kernel: Any, arguments: Mapping[str, Any], warps: int, stages: int) -> Launch:
    params = {param.name: param for param in kernel.params}
    constants = {name: arguments[name] for name, param in params.items() if param.is_constexpr}
    signature = {name: "constexpr" if name in constants else _type_of(arguments[name]) for name in params}
    aligned = tuple(n for n, p in params.items() if signature[n][0] == "*" and not p.do_not_specialize_on_alignment)
    return Launch(kernel=kernel, signature=signature, constants=constants, aligned=aligned, warps=warps, stages=stages)


def _type_of(argument: Any) -> str:
    if isinstance(argument, Tensor):
        return f"*{_TYPES[argument.dtype]}"
    return "fp32" if isinstance(argument, float) else "i32"


def n_processors(device: torch.device) -> int:
    """Streaming multiprocessors of the GPU that holds the tensors."""
    if device.type != "cuda":
        return _PROCESSORS_WITHOUT_GPU
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least ``n``."""
    return 1 << (n - 1).bit_length()
