"""The torch decoder module as a ``DenseExecutor``: the reference, used for calibration and parity tests."""

from collections.abc import Callable

import torch

from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.base import Attend
from trt_kv.runtime.backends.step import Ints


class TorchDecoderExecutor:
    """Runs any callable ``decoder(input_ids, positions, logit_rows, attend) -> logits`` on torch tensors."""

    def __init__(self, decoder: Callable[..., torch.Tensor]) -> None:
        self._decoder = decoder

    @property
    def description(self) -> str:
        return f"torch {torch.__version__} on the CPU"

    def run(self, input_ids: Ints, positions: Ints, logit_rows: Ints, attend: Attend) -> Floats:
        """See ``DenseExecutor.run``."""

        def attend_torch(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(attend(layer, _numpy(q), _numpy(k), _numpy(v))).to(q.dtype)

        with torch.inference_mode():
            arguments = [torch.from_numpy(a) for a in (input_ids, positions, logit_rows)]
            return _numpy(self._decoder(*arguments, attend_torch))


def _numpy(tensor: torch.Tensor) -> Floats:
    array: Floats = tensor.float().contiguous().numpy()
    return array
