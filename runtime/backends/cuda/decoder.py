"""Interface between a step on a device and the dense layers of its decoder."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from trt_kv.errors import UsageError

DeviceAttend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer, q [N, H, D], k [N, K, D], v [N, K, D]) -> [N, H, D]``, all in the decoder's type and on its device."""


class DeviceDecoder(Protocol):
    """The dense layers of a decoder on a device. Holds no state between steps; a call never waits for the device."""

    @property
    def description(self) -> str:
        """What runs the dense layers, for reports: library and version."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of weights and tensors."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights, queries, keys and values."""
        ...

    @property
    def stream(self) -> torch.cuda.Stream | None:
        """The only stream that calls may be made on; None: any stream."""
        ...

    @property
    def can_be_recorded(self) -> bool:
        """Whether calls can be captured in a CUDA graph."""
        ...

    def __call__(self, input_ids: Tensor, positions: Tensor, logit_rows: Tensor, attend: DeviceAttend) -> Tensor:
        """Logits [R, V] of the rows ``logit_rows`` [R] of the tokens ``input_ids`` [N] at ``positions`` [N], all int64.
        ``attend`` is called once per layer, in order, and launches on the current stream.
        """
        ...


class ModuleDecoder:
    """A torch module as a ``DeviceDecoder``."""

    stream = None
    can_be_recorded = True

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        """``module`` takes the arguments of a ``DeviceDecoder``; it is moved to ``device`` and put into evaluation mode.

        Raises ``UsageError`` unless all of its parameters have the same dtype.
        """
        types = {parameter.dtype for parameter in module.parameters()}
        if len(types) != 1:
            raise UsageError(
                "a decoder's parameters must have one dtype", got=sorted(map(str, types)), expected="e.g. torch.float16"
            )
        (self.dtype,) = types
        self.device = device
        self._module = module.to(device).eval()

    @property
    def description(self) -> str:
        return f"torch {torch.__version__}"

    def __call__(self, input_ids: Tensor, positions: Tensor, logit_rows: Tensor, attend: DeviceAttend) -> Tensor:
        logits: Tensor = self._module(input_ids, positions, logit_rows, attend)
        return logits
