"""Where an engine runs: names of devices, and what users are told where there is none. The command line asks it, too: torch is
imported where it is used.
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trt_kv.errors import CapacityError, UnknownNameError, UsageError
from trt_kv.manifest import DTYPES

if TYPE_CHECKING:
    import torch

HOST = "cpu"
DENSE = ("torch", "onnxruntime")
"""What can run a decoder's dense parts on a device; the first is the default."""


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """What is chosen for devices only; see ``Engine.load``. None: the default."""

    dense: str | None = None
    dtype: str | None = None
    batch: int | None = None
    profile: str | None = None
    cuda_graphs: bool | None = None
    batch_invariant: bool | None = None

    def __post_init__(self) -> None:
        if self.dense is not None and self.dense not in DENSE:
            raise UnknownNameError("way to run dense parts", self.dense, DENSE)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UnknownNameError("dtype", self.dtype, DTYPES)

    def check_host(self) -> None:
        """``UsageError`` where anything is chosen, for an engine on the host."""
        given = [f"{name}={value}" for name, value in vars(self).items() if value is not None]
        if given:
            raise UsageError(
                f"{given[0].split('=')[0]} is for devices",
                got=f"{', '.join(given)} on the device {HOST}",
                fix="add device=cuda, or leave it out",
            )


def device_from_name(name: str) -> "torch.device | None":
    """The GPU called "cuda" or "cuda:N"; None for "cpu", which means the kernels of the host.

    ``UsageError`` for another name, or where torch finds no such GPU.
    """
    if name == HOST:
        return None
    if not re.fullmatch(r"cuda(:\d+)?", name):
        raise UsageError("unknown device", got=repr(name), expected="cpu, cuda, or cuda:N")
    import torch

    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    number = int(name.partition(":")[2] or 0)
    if number >= n_gpus:
        raise UsageError(
            f"no GPU for the device {name!r}",
            got=f"torch {torch.__version__} finds {n_gpus} NVIDIA GPUs that it can use",
            expected=f"at least {number + 1}",
            fix="see `trt-kv doctor`: a GPU needs its driver and a build of torch for CUDA; or take the device cpu",
        )
    return torch.device("cuda", number)


def free_device_bytes(device: "torch.device") -> int:
    """Memory of a GPU that nobody has taken, or that torch would hand out again."""
    import torch

    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


@contextlib.contextmanager
def told_out_of_memory(what: str, *, fix: str) -> Iterator[None]:
    """``CapacityError`` where the memory of a GPU, or what can be pinned for it, does not do for what is done inside."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
        if "out of memory" not in str(error):
            raise
        raise CapacityError(what, got=(str(error).splitlines() or ["no memory"])[0], fix=fix) from error
