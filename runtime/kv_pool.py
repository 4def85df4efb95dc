"""The KV pool: one allocation of pages that all layers and sequences draw from.

One pool for all layers, because budgets differ per layer: pages that one layer gives up serve any other
(docs/decisions/0001-one-page-pool.md).
"""

from collections import Counter
from collections.abc import Iterable
from typing import Protocol
from weakref import WeakSet

import numpy as np

from trt_kv.errors import CapacityError


class Holder(Protocol):
    """Somebody who owns pages of a pool."""

    @property
    def pages(self) -> list[int]: ...


class KvPool:
    """``n_pages`` pages of ``page_size`` slots: kv [M, 2, K, P, D], token_positions and scores [M, K, P].

    The arrays are reserved, not touched: the operating system commits memory page by page as it is written.
    """

    on_host = True
    """Whether kernels of the host can read the arrays."""

    def __init__(self, *, n_pages: int, page_size: int, n_kv_heads: int, head_size: int) -> None:
        self.page_size = page_size
        self.kv = np.empty((n_pages, 2, n_kv_heads, page_size, head_size), np.float32)
        self.token_positions = np.empty((n_pages, n_kv_heads, page_size), np.int64)
        self.scores = np.empty((n_pages, n_kv_heads, page_size), np.float32)
        self._free = list(range(n_pages - 1, -1, -1))
        self._holders: WeakSet[Holder] = WeakSet()

    @property
    def n_pages(self) -> int:
        return len(self.kv)

    @property
    def n_free(self) -> int:
        return len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page over all three arrays."""
        return (self.kv.nbytes + self.token_positions.nbytes + self.scores.nbytes) // self.n_pages

    @property
    def used_bytes(self) -> int:
        return (self.n_pages - self.n_free) * self.page_bytes

    def allocate(self, n_pages: int) -> list[int]:
        """Take pages from the free list; ``CapacityError`` before anything is taken if there are not enough."""
        if n_pages > self.n_free:
            raise CapacityError(
                "the KV pool is full",
                got=f"{n_pages} pages of {self.page_size} tokens needed, {self.n_free} of {self.n_pages} free",
                fix="raise cache_tokens when loading the engine, send fewer sequences at once, or build with a smaller budget",
            )
        taken = self._free[len(self._free) - n_pages :]
        del self._free[len(self._free) - n_pages :]
        return taken[::-1]

    def release(self, pages: Iterable[int]) -> None:
        """Give pages back; the most recently used are handed out first, while they are warm."""
        self._free.extend(pages)

    def register(self, holder: Holder) -> None:
        """Let ``reclaim`` know of somebody who may own pages."""
        self._holders.add(holder)

    def reclaim(self) -> None:
        """After Ctrl-C in the middle of the bookkeeping: free is again every page that no living holder owns."""
        held = {page for holder in self._holders for page in holder.pages}
        self._free = [page for page in range(self.n_pages - 1, -1, -1) if page not in held]

    def check_integrity(self, owned: Iterable[int]) -> None:
        """Raise ``CapacityError`` unless every page is either free or ``owned``, exactly once."""
        counts = Counter([*self._free, *owned])
        wrong = {page: counts[page] for page in range(self.n_pages) if counts[page] != 1}
        if wrong or len(counts) != self.n_pages:
            raise CapacityError(
                "the KV pool lost track of its pages", got=f"pages by number of owners: {wrong}", expected="1 each"
            )
