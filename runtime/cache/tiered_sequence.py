"""A sequence whose cache lies on the host in some layers and on the device in the others."""

from collections.abc import Sequence
from typing import Any, Protocol, Self

from trt_kv.errors import TrtKvError
from trt_kv.runtime.backends.step import Ints
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.page_pool import PagePool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.statistics import RecallStatistics


class Held(Protocol):
    """What of one layer of a sequence is on the device."""

    @property
    def failure(self) -> TrtKvError | None:
        """Why the layer's pages are lost."""
        ...

    @property
    def n_held_tokens(self) -> int:
        """Tokens that its device pages have room for."""
        ...


class HeldByRow(Protocol):
    """What is on the device, by the number of a layer's first host page."""

    def get(self, row: int, /) -> Held | None: ...


class Tiers(Protocol):
    """Two tiers, and what is kept of sequences beside their page tables."""

    @property
    def host(self) -> PagePool:
        """Where the pages of layers are that recall."""
        ...

    @property
    def device(self) -> KvPool[Any]:
        """Where those of the others are."""
        ...

    @property
    def sets(self) -> HeldByRow: ...

    @property
    def statistics(self) -> RecallStatistics | None:
        """What was recalled; None where it is not counted."""
        ...

    def fork(self, pages: Ints, twin_pages: Ints) -> None:
        """Copy one layer of a sequence, whose host pages are ``pages``, to the new host pages ``twin_pages``."""
        ...

    def warm_up(self) -> None:
        """Compile what is compiled at its first call and is not a kernel of an op."""
        ...

    def release(self, rows: Sequence[int]) -> None:
        """Forget layers of sequences, known by their first host pages."""
        ...

    def close(self) -> None:
        """Release everything; nothing is recalled afterwards."""
        ...


class TieredSequence(SequenceCache):
    """Page tables name host pages in ``host_layers`` and device pages elsewhere."""

    def __init__(self, recall: Tiers, *, n_layers: int, host_layers: Sequence[int]) -> None:
        self._recall = recall
        self._host_layers = frozenset(host_layers)
        super().__init__(recall.device, n_layers=n_layers)

    @property
    def failure(self) -> TrtKvError | None:
        """Why this sequence cannot go on: the first of its layers whose pages were lost."""
        return next((w.failure for w in self._working_sets() if w is not None and w.failure is not None), None)

    @property
    def held_tokens(self) -> Ints:
        """Tokens of each layer that the device has room for; where the cache stays on the host, its working set."""
        held = self.kv_len.copy()
        for layer, working_set in enumerate(self._working_sets()):
            if working_set is not None:
                held[layer] = min(held[layer], working_set.n_held_tokens)
        return held

    def fork(self) -> Self:
        """See ``SequenceCache.fork``; waits for what is on its way. ``RecallError`` where a page cannot be copied."""
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
        return type(self)(self._recall, n_layers=self.n_layers, host_layers=tuple(self._host_layers))

    def release(self) -> None:
        """Wait for what is on its way, then give every page of both tiers back."""
        self._recall.release([int(self.page_table[layer, 0]) for layer in self._host_layers])
        super().release()

    def _working_sets(self) -> list[Held | None]:
        rows = [self.page_table[layer, 0] if layer in self._host_layers else -1 for layer in range(self.n_layers)]
        return [self._recall.sets.get(int(row)) for row in rows]

    def _pool_of(self, layer: int) -> PagePool:
        return self._recall.host if layer in self._host_layers else self.pool
