"""Names and options of devices, and errors for missing devices and memory.

The command line imports this module, so torch is imported only inside functions.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trt_kv.errors import CapacityError, UnknownNameError, UsageError, load_option
from trt_kv.manifest import DTYPES
from trt_kv.require import require

if TYPE_CHECKING:
    import torch

HOST = "cpu"
DENSE = ("torch", "onnxruntime")
"""Libraries that can run a decoder's dense layers on a device; the first is the default."""
HOST_DENSE = ("native", "onnxruntime", "openvino")
"""What can run them on the host: kernels of our own, for weights of int8 or int4 whose products round activations to int8, the
default for these; a library, of which the first is the default for others.
"""
PRECISIONS = ("float32", "bfloat16", "int8")
"""Types of what weights are multiplied by, with OpenVINO. int8: integers with a scale per row and block of 32, for quantised
weights."""


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Options that apply only to devices; see ``Engine.load``. None: the default."""

    dense: str | None = None
    dtype: str | None = None
    batch: int | None = None
    profile: str | None = None
    cuda_graphs: bool | None = None
    batch_invariant: bool | None = None

    def __post_init__(self) -> None:
        if self.dense is not None and self.dense not in DENSE:
            raise UnknownNameError("library for dense layers", self.dense, DENSE)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UnknownNameError("dtype", self.dtype, DTYPES)

    def check_host(self) -> None:
        """``UsageError`` if any option is set that only devices have; for engines on the host, whose ``dense`` is checked
        elsewhere.
        """
        given = [f"{name}={value}" for name, value in vars(self).items() if value is not None and name != "batch_invariant"]
        if given:
            raise UsageError(
                f"{given[0].split('=')[0]} is for devices",
                got=f"{', '.join(given)} on the device {HOST}",
                fix=f"add {load_option('device', 'cuda')}, or leave it out",
            )


def check_host_dense(dense: str | None, precision: str | None) -> None:
    """``UsageError`` unless a host can run dense layers with ``dense`` in ``precision``; None: the default."""
    if dense is not None and dense not in HOST_DENSE:
        raise UnknownNameError("implementation of dense layers on the CPU", dense, HOST_DENSE)
    if precision is None:
        return
    if precision not in PRECISIONS:
        raise UnknownNameError("precision", precision, PRECISIONS)
    if dense != "openvino":
        raise UsageError(
            "only OpenVINO computes in another precision than the engine was built for",
            got=f"precision {precision!r}",
            expected="none",
            fix=f"add {load_option('dense', 'openvino')}, or leave it out",
        )


def device_from_name(name: str) -> "torch.device | None":
    """The GPU named "cuda" or "cuda:N"; None for "cpu", which means the host kernels.

    ``UsageError`` for another name, or if torch finds no such GPU; ``MissingDependencyError`` without torch.
    """
    if name == HOST:
        return None
    if not isinstance(name, str) or not re.fullmatch(r"cuda(:\d+)?", name):
        raise UsageError("unknown device", got=repr(name), expected="cpu, cuda, or cuda:N")
    require("torch", extra="gpu")
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(name.partition(":")[2] or 0)
    if number >= n_gpus:
        raise UsageError(
            f"no GPU for the device {name!r}",
            got=f"torch {torch.__version__} finds {n_gpus} NVIDIA GPUs that it can use",
            expected=f"at least {number + 1}",
            fix="see `trt-kv doctor`: a GPU needs its driver and a CUDA build of torch; or use the device cpu",
        )
    return torch.device("cuda", number)


def free_device_bytes(device: "torch.device") -> int:
    """Free bytes of a GPU, including memory that torch has reserved and not allocated."""
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


@contextlib.contextmanager
def told_out_of_memory(what: str, *, fix: str) -> Iterator[None]:
    """Raise ``CapacityError`` if GPU memory or pinned host memory runs out inside the block."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        if "out of memory" not in str(error):
            raise
        raise CapacityError(what, got=(str(error).splitlines() or ["no memory"])[0], fix=fix) from error
