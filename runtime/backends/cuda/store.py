"""A KV pool in the memory of a torch device."""

import numpy as np
import torch
from torch import Tensor

from trt_kv.runtime.backends.step import Ints
from trt_kv.runtime.cache.kv_pool import KvPool

TORCH_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Torch dtypes of keys and values, by the dtype names of engines."""


class DeviceKvPool(KvPool[Tensor]):
    """The arrays of a ``KvPool`` as torch tensors on ``device``; kv, summaries and last_query in ``dtype``.

    The model runner refuses operations that read them with host kernels (scores, per-request budgets).
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
        summary_rows: int = 2,
        device: str | torch.device = "cuda",
        spare_page: bool = False,
    ) -> None:
        """``summary_rows``: as ``page_counts.summary_rows`` counts them. ``spare_page``: one more page after the last, which is
        never allocated: padding of steps writes to it.
        """
        super().__init__(n_pages=n_pages, page_size=page_size)
        self.device = torch.device(device)
        self.kv_dtype, self.dtype = dtype, TORCH_TYPES[dtype]
        self.spare_page = n_pages if spare_page else None
        n_rows = n_pages + spare_page
        n_recalling = n_rows if n_query_heads else 0
        self.kv = self._empty(n_rows, 2, n_kv_heads, page_size, head_size)
        self.token_positions = self._empty(n_rows, n_kv_heads, page_size, dtype=torch.int64)
        self.scores = self._empty(n_rows, n_kv_heads, page_size, dtype=torch.float32)
        self.summaries = self._empty(n_recalling, n_kv_heads, summary_rows, head_size)
        self.last_query = self._empty(n_recalling, n_query_heads, head_size)

    def read_pages(self, state: str, pages_M: Ints) -> np.ndarray:
        """See ``KvPool.read_pages``."""
        return bits_on_host(self.states[state][torch.from_numpy(pages_M).to(self.device)])

    def write_pages(self, state: str, pages_M: Ints, values: np.ndarray) -> None:
        """See ``KvPool.write_pages``."""
        into = self.states[state]
        into[torch.from_numpy(pages_M).to(self.device)] = from_bits(values, into.dtype).to(self.device)

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)


def bits_on_host(values: Tensor) -> np.ndarray:
    """A copy on the host; numpy has no bfloat16, so of types of two bytes it has the bits, as int16."""
    copy = values.detach().to("cpu", copy=True)
    bits: np.ndarray = (copy.view(torch.int16) if copy.element_size() == torch.int16.itemsize else copy).numpy()
    return bits


def from_bits(values: np.ndarray, dtype: torch.dtype) -> Tensor:
    """The tensor on the host of which ``bits_on_host`` made ``values``."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.view(dtype) if tensor.dtype != dtype else tensor
