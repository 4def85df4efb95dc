"""A KV pool in the memory of a torch device."""

from typing import Any

import torch
from torch import Tensor

from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.page_pool import PagePool

TORCH_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Types of keys and values by the name that engines have for them."""


class DeviceKvPool(KvPool):
    """The arrays of a ``KvPool`` as torch tensors on ``device``; kv, summaries and last_query in ``dtype``.

    What reads them with the host's kernels (scores, per-request budgets) is refused by the model runner.
    """

    on_host = False

    def __init__(
        self,
        *,
        n_pages: int,
        page_size: int,
        n_kv_heads: int,
        head_size: int,
        dtype: str = "float32",
        n_query_heads: int = 0,
        device: str | torch.device = "cuda",
        spare_page: bool = False,
    ) -> None:
        """``spare_page``: one page behind the last, which nobody is given: what pads a step writes there."""
        # Not KvPool's, which would reserve as much on the host.
        PagePool.__init__(self, n_pages=n_pages, page_size=page_size)
        self.device = torch.device(device)
        self.dtype = TORCH_TYPES[dtype]
        self.spare_page = n_pages if spare_page else None
        n_rows = n_pages + spare_page
        n_recalling = n_rows if n_query_heads else 0
        self.kv = self._empty(n_rows, 2, n_kv_heads, page_size, head_size)
        self.token_positions = self._empty(n_rows, n_kv_heads, page_size, dtype=torch.int64)
        self.scores = self._empty(n_rows, n_kv_heads, page_size, dtype=torch.float32)
        self.summaries = self._empty(n_recalling, n_kv_heads, 2, head_size)
        self.last_query = self._empty(n_recalling, n_query_heads, head_size)

    # KvPool tells everybody else that these are arrays: what looks into them has asked ``on_host`` first.
    kv: Tensor  # type: ignore[assignment]
    token_positions: Tensor  # type: ignore[assignment]
    scores: Tensor  # type: ignore[assignment]
    summaries: Tensor  # type: ignore[assignment]
    last_query: Tensor  # type: ignore[assignment]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """``states`` as what they are here."""
        states: dict[str, Any] = self.states
        return states

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
