"""The KV pool in host memory."""

import numpy as np

from trt_kv.plugins.kv_rows import KvDtype
from trt_kv.runtime.cache.kv_pool import KvPool


class HostKvPool(KvPool[np.ndarray]):
    """A ``KvPool`` of numpy arrays, reserved but not touched: the operating system commits memory as it is written."""

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
    ) -> None:
        """``dtype``: what keys, values and summaries are stored as, a ``KvDtype``; rows of W elements. ``n_query_heads``: H if
        RecallAttention runs on the pool in place, else 0. ``summary_rows``: as ``page_counts.summary_rows`` counts them.
        """
        super().__init__(n_pages=n_pages, page_size=page_size)
        self.kv_dtype, self.dtype = dtype, KvDtype(dtype)
        row_length, stored_as = self.dtype.row_length(head_size), self.dtype.stored_as
        self.kv = np.empty((n_pages, 2, n_kv_heads, page_size, row_length), stored_as)
        self.token_positions = np.empty((n_pages, n_kv_heads, page_size), np.int64)
        self.scores = np.empty((n_pages, n_kv_heads, page_size), np.float32)
        recalls = n_query_heads > 0
        self.summaries = np.empty((n_pages * recalls, n_kv_heads, summary_rows, row_length), stored_as)
        self.last_query = np.empty((n_pages * recalls, n_query_heads, head_size), np.float32)
