"""The KV pool: one allocation of pages that all layers and sequences draw from.

All layers share one pool because budgets differ per layer: a page freed by one layer can be used by any other
(docs/decisions/0001-one-page-pool.md).
"""

from dataclasses import dataclass
from typing import Any, Generic

import numpy as np

from trt_kv.plugins.tensors import Array
from trt_kv.runtime.backends.step import Ints
from trt_kv.runtime.cache.page_pool import PagePool


@dataclass(frozen=True, kw_only=True)
class PoolSizes:
    """Sizes of a pool: M pages of P tokens, K KV heads of size D, and the type in which keys and values are stored."""

    n_pages: int
    page_size: int
    n_kv_heads: int
    head_size: int
    dtype: str


class KvPool(PagePool, Generic[Array]):
    """Pages of ``page_size`` slots: kv [M, 2, K, P, W], token_positions and scores [M, K, P].

    If RecallAttention runs on the pool in place, the pool also holds its states: summaries [M, K, R, W], R = 2 or, with codes,
    more, and last_query [M, H, D], in which a layer of a sequence uses the row of its first page. Otherwise these two have no
    rows. Each backend allocates the arrays in a subclass.
    """

    on_host = True
    """Whether host kernels can read the arrays."""
    kv_dtype: str
    """The type in which keys and values are stored."""
    kv: Array
    token_positions: Array
    scores: Array
    summaries: Array
    last_query: Array

    @property
    def states(self) -> dict[str, Array]:
        """The states of KV ops, by name."""
        states = {"kv": self.kv, "token_positions": self.token_positions, "scores": self.scores}
        return states | {"summaries": self.summaries, "last_query": self.last_query}

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all arrays."""
        states: dict[str, Any] = self.states
        return int(sum(state.nbytes for state in states.values())) // self.n_pages

    def read_pages(self, state: str, pages_M: Ints) -> np.ndarray:
        """A copy on the host of some pages of one of ``states``; of halves, their bits."""
        states: dict[str, Any] = self.states
        pages: np.ndarray = states[state][pages_M]
        return pages

    def write_pages(self, state: str, pages_M: Ints, values: np.ndarray) -> None:
        """Write what ``read_pages`` returned."""
        states: dict[str, Any] = self.states
        states[state][pages_M] = values
