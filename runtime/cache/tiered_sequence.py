"""A sequence whose KV cache is on the host for some layers and on the device for the others."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, Self

import numpy as np

from trt_kv.errors import TrtKvError
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.runtime.backends.step import Ints
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.page_pool import PagePool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.generation import RequestRecall
from trt_kv.runtime.statistics import RecallStatistics


class Held(Protocol):
    """The part of one layer of a sequence that is on the device."""

    @property
    def failure(self) -> TrtKvError | None:
        """The error by which the layer's pages were lost; None if they were not."""
        ...

    @property
    def n_held_tokens(self) -> int:
        """Capacity of its device pages, in tokens."""
        ...


class HeldByRow(Protocol):
    """The parts of layers on the device, by the number of the layer's first host page."""

    def get(self, row: int, /) -> Held | None: ...


class Tiers(Protocol):
    """The host and device tiers, and the state of sequences that is not in their page tables."""

    @property
    def host(self) -> PagePool:
        """The pool of the layers that recall."""
        ...

    @property
    def device(self) -> KvPool[Any]:
        """The pool of the other layers."""
        ...

    @property
    def sets(self) -> HeldByRow: ...

    @property
    def statistics(self) -> RecallStatistics | None:
        """Counts of recall; None if they are not kept."""
        ...

    def fork(self, pages: Ints, twin_pages: Ints) -> None:
        """Copy one layer of a sequence from its host pages ``pages`` to the new host pages ``twin_pages`` of its fork."""
        ...

    def warm_up(self) -> None:
        """Compile the functions that are compiled at their first call, other than kernels of ops."""
        ...

    def release(self, rows: Sequence[int]) -> None:
        """Free the state of layers of sequences, identified by their first host pages."""
        ...

    def close(self) -> None:
        """Release everything; nothing is recalled afterwards."""
        ...


class CopyableTiers(Tiers, Protocol):
    """Tiers whose pages can be copied, for prefix reuse and conversations (``CacheBlocks``, ``SequenceStates``)."""

    @property
    def in_memory(self) -> bool:
        """Whether every page is in the host's memory, also one that is not full."""
        ...

    def read_pages(self, row: int, pages: Ints) -> Mapping[str, np.ndarray]:
        """Copies of full pages of the layer whose first host page is ``row``: "kv" and "summaries", as in ``CacheBlocks``.
        ``RecallError`` if they have been lost.
        """
        ...

    def read_open_page(self, row: int, page: int, number: int, limits: PageLimits) -> np.ndarray:
        """A copy [2, K, P, W] of the page of that layer that is not full, its ``number``-th, in the place where attention reads
        it; ``page``: its host page. ``limits``: those of the layer's RecallAttention. ``RecallError`` as above.
        """
        ...

    def write_pages(self, pages: Ints, values: Mapping[str, np.ndarray]) -> None:
        """Write pages that were read, also the open one, to new pages. ``RecallError`` if that fails."""
        ...

    def begin_at(self, pages: Ints, positions_MP: Ints, limits: PageLimits, *, n_tokens: int) -> None:
        """Let a layer of a new sequence begin with ``n_tokens`` in ``pages``, which ``write_pages`` has written. ``limits``:
        those of its RecallAttention.
        """
        ...


class TieredSequence(SequenceCache):
    """A ``SequenceCache`` whose page table lists host pages for ``host_layers`` and device pages for the other layers."""

    def __init__(self, recall: Tiers, *, n_layers: int, host_layers: Sequence[int], windows: Sequence[int] = ()) -> None:
        self._recall = recall
        self._host_layers = frozenset(host_layers)
        super().__init__(recall.device, n_layers=n_layers, windows=windows)

    @property
    def failure(self) -> TrtKvError | None:
        """The error of the first layer whose pages were lost; None if no layer lost any."""
        return next((w.failure for w in self._working_sets() if w is not None and w.failure is not None), None)

    @property
    def recalled(self) -> RequestRecall | None:
        """Counts of all layers that recall; see ``SequenceCache``."""
        counts = self._recall.statistics
        return None if counts is None else counts.of_request([row for row in self._rows if row >= 0])

    @property
    def held_tokens(self) -> Ints:
        """[L]: tokens of each layer; of a layer whose cache is on the host, at most the capacity of its working set."""
        held = self.kv_len.copy()
        for layer, working_set in enumerate(self._working_sets()):
            if working_set is not None:
                held[layer] = min(held[layer], working_set.n_held_tokens)
        return held

    def fork(self) -> Self:
        """See ``SequenceCache.fork``. Waits for pending copies. ``RecallError`` if a page cannot be copied."""
        twin = super().fork()
        try:
            for layer in self._host_layers:
                n_pages = self._n_pages[layer]
                if n_pages:
                    self._recall.fork(self.page_table[layer, :n_pages], twin.page_table[layer, :n_pages])
        except BaseException:
            twin.release()
            raise
        return twin

    def _empty_twin(self) -> Self:
        host_layers = tuple(self._host_layers)
        return type(self)(self._recall, n_layers=self.n_layers, host_layers=host_layers, windows=self._windows)

    def release(self) -> None:
        """Wait for pending copies, then free every page of both tiers."""
        self._recall.release(self._rows)
        if self._recall.statistics is not None:
            self._recall.statistics.forget([row for row in self._rows if row >= 0])
        super().release()

    @property
    def _rows(self) -> list[int]:
        """The first page of each layer whose cache is on the host; -1 before it has one."""
        return [int(self.page_table[layer, 0]) for layer in self._host_layers]

    def _working_sets(self) -> list[Held | None]:
        rows = [self.page_table[layer, 0] if layer in self._host_layers else -1 for layer in range(self.n_layers)]
        return [self._recall.sets.get(int(row)) for row in rows]

    def _pool_of(self, layer: int) -> PagePool:
        return self._recall.host if layer in self._host_layers else self.pool
