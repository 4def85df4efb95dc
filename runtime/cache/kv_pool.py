"""The KV pool: one allocation of pages that all layers and sequences draw from.

One pool for all layers, because budgets differ per layer: pages that one layer gives up serve any other
(docs/decisions/0001-one-page-pool.md).
"""

import numpy as np

from trt_kv.model_config import ModelConfig
from trt_kv.runtime.cache.page_pool import PagePool


def token_bytes(config: ModelConfig, *, element_bytes: int) -> int:
    """Bytes that a pool has for one token of one layer: keys and values, an int64 position and an fp32 score per KV head."""
    return config.n_kv_heads * (2 * config.head_dim * element_bytes + 8 + 4)


class KvPool(PagePool):
    """Pages of ``page_size`` slots: kv [M, 2, K, P, D], token_positions and scores [M, K, P].

    With ``n_query_heads`` also what RecallAttention keeps when it runs on the pool in place: summaries [M, K, 2, D], and
    last_query [M, H, D], where a layer of a sequence has the row of its first page. The arrays are reserved, not touched: the
    operating system commits memory page by page as it is written.
    """

    on_host = True
    """Whether kernels of the host can read the arrays."""

    def __init__(self, *, n_pages: int, page_size: int, n_kv_heads: int, head_size: int, n_query_heads: int = 0) -> None:
        super().__init__(n_pages=n_pages, page_size=page_size)
        self.kv = np.empty((n_pages, 2, n_kv_heads, page_size, head_size), np.float32)
        self.token_positions = np.empty((n_pages, n_kv_heads, page_size), np.int64)
        self.scores = np.empty((n_pages, n_kv_heads, page_size), np.float32)
        recalls = n_query_heads > 0
        self.summaries = np.empty((n_pages * recalls, n_kv_heads, 2, head_size), np.float32)
        self.last_query = np.empty((n_pages * recalls, n_query_heads, head_size), np.float32)

    @property
    def states(self) -> dict[str, np.ndarray]:
        """The states of KV ops, by name."""
        states: dict[str, np.ndarray] = {"kv": self.kv, "token_positions": self.token_positions, "scores": self.scores}
        return states | {"summaries": self.summaries, "last_query": self.last_query}

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all arrays."""
        return sum(state.nbytes for state in self.states.values()) // self.n_pages
