"""The KV cache of one sequence: its pages and length per layer, and the slots of its next tokens.

A layer with an attention window holds the window: pages at its front are freed once no later query can see them
(docs/decisions/0038-windows.md).
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from trt_kv.errors import CapacityError, TrtKvError
from trt_kv.plugins.paging import Floats
from trt_kv.policy import Policy
from trt_kv.runtime.backends.step import Ints
from trt_kv.runtime.cache.draws import Draws, page_ranges
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.page_pool import PagePool
from trt_kv.runtime.generation import RequestRecall


@dataclass(frozen=True, kw_only=True)
class SharedPages:
    """Pages at the beginning of a prompt that several sequences read (runtime/prefix/sharing.py).

    ``pages_LN``: of each layer, from the second page on. ``first``: copies of the first ones, as a ``Block``.
    """

    first: Mapping[str, np.ndarray]
    pages_LN: Ints


class SequenceCache:
    """Pages, lengths and decode-time eviction of one sequence over L layers."""

    def __init__(
        self,
        pool: KvPool[Any],
        *,
        n_layers: int,
        decode_distance: int = Policy.decode_distance,
        floor: int = 0,
        windows: Sequence[int] = (),
    ) -> None:
        """``floor``: a layer that holds fewer tokens evicts none while decoding. ``windows``: each layer's attention window in
        tokens, 0 for none; empty: no layer has one.
        """
        self.pool = pool
        self.num_computed_tokens = 0
        """Prompt and generated tokens so far; also the position of the next token."""
        self.kv_len: Ints = np.zeros(n_layers, np.int64)
        self.page_table: Ints = np.full((n_layers, 8), -1, np.int64)
        self._n_pages: Ints = np.zeros(n_layers, np.int64)
        self._decode_distance = decode_distance
        self._floor = floor
        self._windows = tuple(windows) or (0,) * n_layers
        self._growth: list[float] | None = None
        self._reuse_order: list[deque[int]] = []
        self._n_fixed: Ints = np.zeros(n_layers, np.int64)
        """[L]: tokens of each layer that were there when decoding began, and that are never drawn."""
        self._ranges: list[dict[int, Floats]] = [{} for _ in range(n_layers)]
        """Of each layer, ``page_ranges`` of the pages that may be drawn."""
        self.is_evicted = False
        """Whether tokens have been evicted from the prompt, so that decode-time eviction may begin."""
        self.n_prompt = 0
        """Prompt tokens read so far; of a conversation, all tokens before the current answer."""
        self.goes_on = False
        """Whether it began with what an earlier turn had kept, so that budgets are of more tokens than it holds."""
        self.n_shared_pages = 0
        """Pages of each layer, behind its first one, that are in the page table and belong to a shared block."""
        self.adaptive_budget: Ints = np.full(n_layers, -1, np.int64)
        """[L]: tokens that a step may attend to, as computed from the prompt by AdaptiveBudget; -1 for layers without it."""
        self._owner_in = {pool: pool.new_owner() for pool in self._pools}
        """Owner number of this sequence in each pool that holds its pages."""

    @property
    def n_layers(self) -> int:
        return len(self.kv_len)

    @property
    def failure(self) -> TrtKvError | None:
        """The error that stops this sequence but not the others of its batch; None if it can continue."""
        return None

    @property
    def recalled(self) -> RequestRecall | None:
        """What has been recalled for this sequence; None if its cache is not on the host, or nobody counts."""
        return None

    @property
    def held_tokens(self) -> Ints:
        """[L]: tokens of each layer in the memory that attention reads."""
        return self.kv_len

    @property
    def pages(self) -> list[int]:
        """Every page of ``pool`` that this sequence owns, over all layers."""
        return self.pages_in(self.pool)

    def pages_in(self, pool: PagePool) -> list[int]:
        """The pages of ``pool`` that this sequence owns, layer by layer."""
        return [int(page) for layer in self._layers_in(pool) for page in self.own_pages(layer)]

    def own_pages(self, layer: int) -> Ints:
        """The layer's pages that are not shared."""
        pages: Ints = np.delete(self.page_table[layer, : self._n_pages[layer]], slice(1, 1 + self.n_shared_pages))
        return pages

    def _pool_of(self, layer: int) -> PagePool:
        """The pool that holds the layer's pages."""
        return self.pool

    def free_passed(self) -> None:
        """Free the pages of layers with a window in which no token is visible to the next query or to any after it.

        Such a layer holds its tokens in order of position, so these are the first pages of its page table.
        """
        if not any(self._windows):
            return
        size, kv_len = self.pool.page_size, self.kv_len.copy()
        for layer, window in enumerate(self._windows):
            n_hidden = int(kv_len[layer]) - (window - 1)
            n_freed = max(0, n_hidden) // size if window else 0
            if n_freed:
                n_left = int(self._n_pages[layer]) - n_freed
                self.pool.release(self.page_table[layer, :n_freed])
                self.page_table[layer, :n_left] = self.page_table[layer, n_freed : n_freed + n_left].copy()
                self.page_table[layer, n_left:] = -1
                self._n_pages[layer] = n_left
                kv_len[layer] -= n_freed * size
        self.kv_len = kv_len

    def begin_at(self, n_tokens: int, shared: SharedPages | None = None) -> None:
        """Allocate the pages that an empty sequence has after reading ``n_tokens``, whole pages, of a prompt, except those that
        are ``shared``. On ``CapacityError`` nothing has changed.
        """
        size = self.pool.page_size
        kv_len = np.array([pages_of_prompt(n_tokens, window=window, page_size=size) for window in self._windows]) * size
        if shared is not None:
            self._share(shared.pages_LN)
        self._grow_tables(kv_len // size)
        self.kv_len = kv_len
        self.num_computed_tokens = self.n_prompt = n_tokens

    def _share(self, pages_LN: Ints) -> None:
        self._grow_tables(np.ones(self.n_layers, np.int64))
        n_shared = pages_LN.shape[1]
        self._widen(1 + n_shared)
        self.page_table[:, 1 : 1 + n_shared] = pages_LN
        self._n_pages[:] = 1 + n_shared
        self.n_shared_pages = n_shared

    def new_owners(self) -> dict[PagePool, int]:
        """A new owner number in each pool that holds pages of this sequence."""
        return {pool: pool.new_owner() for pool in self._pools}

    def give(self, pages_LN: Ints, owners: Mapping[PagePool, int]) -> None:
        """Let pages of each layer, which follow those that are shared, belong to ``owners``."""
        for layer in range(self.n_layers):
            pool = self._pool_of(layer)
            pool.give(pages_LN[layer], owners[pool])
        self.n_shared_pages += pages_LN.shape[1]

    def begin_with(self, kv_len: Sequence[int], num_computed_tokens: int) -> None:
        """Allocate the pages of an empty sequence that goes on from ``num_computed_tokens`` tokens, of which layer l holds
        ``kv_len[l]``. On ``CapacityError`` nothing has changed.
        """
        self._grow_tables(-(-np.array(kv_len, np.int64) // self.pool.page_size))
        self.kv_len = np.array(kv_len, np.int64)
        self.num_computed_tokens = self.n_prompt = num_computed_tokens
        self.goes_on = True

    def make_room(self, n_new: int) -> None:
        """Allocate the pages that ``append(n_new)`` needs. On ``CapacityError`` nothing has changed."""
        self._grow_tables(-(-self._lengths_after(n_new) // self.pool.page_size))

    def append(self, n_new: int) -> Ints:
        """Add ``n_new`` tokens and return their pool slots [L, n_new]. On ``CapacityError`` the sequence is unchanged.

        With decode-time eviction (``growth`` of ``shrink``), a single new token takes the slot of an older one in every layer
        that holds more than its share (see ``_evicts_for_next``), except in layers with a window.
        """
        self.make_room(n_new)
        new_len = self._lengths_after(n_new)
        slots = self._next_slots(n_new)
        if self._growth is not None:
            for layer in range(self.n_layers):
                if new_len[layer] == self.kv_len[layer]:
                    slots[layer] = self._reuse_order[layer].popleft()
                if not self._windows[layer]:
                    self._reuse_order[layer].extend(int(slot) for slot in slots[layer])
        self.kv_len = new_len
        self.num_computed_tokens += n_new
        return slots

    def _lengths_after(self, n_new: int) -> Ints:
        """[L]: tokens of each layer after ``n_new`` more."""
        lengths: Ints = self.kv_len + n_new
        if n_new == 1 and self._growth is not None:
            lengths -= np.array([self._evicts_for_next(layer) for layer in range(self.n_layers)])
        return lengths

    def shrink(self, kept: Ints, growth: Sequence[float] | None) -> None:
        """Record the prompt's eviction: layer l holds ``kept[l]`` tokens in order of position. Pages beyond them are freed.

        From then on layer l grows by ``growth[l]`` tokens per generated token: decode-time eviction of PrefixKV's released
        code, which deletes the row ``decode_distance`` before the end of the compressed prompt (or its middle, if it is
        shorter). None: it grows by every token, unless EvictTokens runs while decoding (``settle``).
        """
        assert all(kept[layer] == self.kv_len[layer] for layer, window in enumerate(self._windows) if window)
        self.is_evicted = True
        self._growth = None if growth is None else list(growth)
        self._reuse_order = []
        for layer in range(self.n_layers):
            n_kept = int(kept[layer])
            n_pages = -(-n_kept // self.pool.page_size)
            self.pool.release(self.page_table[layer, n_pages : self._n_pages[layer]])
            self.page_table[layer, n_pages:] = -1
            self._n_pages[layer] = n_pages
            fixed = n_kept - self._decode_distance
            first = fixed if fixed >= 1 else n_kept // 2
            if self._windows[layer]:
                first = n_kept  # a window moves on by whole pages
            self._reuse_order.append(deque(int(slot) for slot in self._slots(layer, range(first, n_kept))))
        self.kv_len = np.array(kept, np.int64)

    def settle(self, kept: Ints) -> None:
        """Record that EvictTokens ran while decoding: layer l holds ``kept[l]`` tokens. Its pages stay allocated."""
        self.kv_len = np.array(kept, np.int64)

    def protect(self) -> None:
        """From now on, what the layers hold is never drawn (``draw``)."""
        self._n_fixed = self.kv_len.copy()
        self._ranges = [{} for _ in range(self.n_layers)]

    def draw(self, draws: Draws) -> None:
        """Free one page of each layer without a window that holds ``draws.most`` generated tokens: a full page of generated
        tokens alone, none of them among the newest page_size ones.
        """
        size = self.pool.page_size
        full = (self.kv_len - self._n_fixed >= draws.most(size)) & (np.array(self._windows) == 0)
        if not full.any():
            return
        kv_len = self.kv_len.copy()
        for layer in map(int, np.flatnonzero(full)):
            first, end = -(-int(self._n_fixed[layer]) // size), (int(kv_len[layer]) - size) // size
            ranges_XK = self._value_ranges(layer, first, end) if draws.extreme else None
            at = first + draws.page(ranges_XK, end - first, layer=layer, n_seen=self.num_computed_tokens)
            n_pages = int(self._n_pages[layer])
            self._ranges[layer].pop(int(self.page_table[layer, at]), None)
            self.pool.release(self.page_table[layer, at : at + 1])
            self.page_table[layer, at : n_pages - 1] = self.page_table[layer, at + 1 : n_pages].copy()
            self.page_table[layer, n_pages - 1] = -1
            self._n_pages[layer] = n_pages - 1
            kv_len[layer] -= size
        self.kv_len = kv_len

    def _value_ranges(self, layer: int, first: int, end: int) -> Floats:
        """[X, K]: ``page_ranges`` of the layer's pages from ``first`` to ``end`` - 1, each of which is read once."""
        pages, known = [int(page) for page in self.page_table[layer, first:end]], self._ranges[layer]
        if new := [page for page in pages if page not in known]:
            known.update(page_ranges(new, self.pool.read_pages("kv", np.array(new))[:, 1], self.pool.kv_dtype))
        return np.stack([known[page] for page in pages])

    def fork(self) -> Self:
        """A copy of this sequence in pages of its own, which grows and shrinks independently.

        Raises ``CapacityError``, without allocating any page, if fewer are free than this sequence owns.
        """
        twin = self._empty_twin()
        twin._grow_tables(self._n_pages)
        for array in self.pool.states.values():
            if len(array):
                array[twin.pages] = array[self._table_of(self.pool)]
        twin.num_computed_tokens = self.num_computed_tokens
        twin.n_prompt = self.n_prompt
        twin.adaptive_budget = self.adaptive_budget.copy()
        twin.kv_len = self.kv_len.copy()
        twin._n_fixed = self._n_fixed.copy()
        twin.is_evicted = self.is_evicted
        twin.goes_on = self.goes_on
        if self._growth is not None:
            twin._growth = list(self._growth)
            slot_of_page = dict(zip(self.pages, twin.pages, strict=True))
            size = self.pool.page_size
            twin._reuse_order = [
                deque(slot_of_page[slot // size] * size + slot % size for slot in slots) for slots in self._reuse_order
            ]
        return twin

    def _empty_twin(self) -> Self:
        return type(self)(
            self.pool,
            n_layers=self.n_layers,
            decode_distance=self._decode_distance,
            floor=self._floor,
            windows=self._windows,
        )

    def release(self) -> None:
        """Free all pages; the sequence is empty afterwards. May be called again, also after an interrupted call."""
        for pool, owner in self._owner_in.items():
            pool.release_owner(owner)
        self.page_table[:] = -1
        self._n_pages[:] = 0
        self.kv_len = np.zeros_like(self.kv_len)
        self._growth = None
        self.is_evicted = self.goes_on = False
        self.num_computed_tokens = 0
        self.n_prompt = self.n_shared_pages = 0
        self.adaptive_budget[:] = -1

    def _table_of(self, pool: PagePool) -> list[int]:
        """All pages of ``pool`` in the page table, also shared ones, layer by layer."""
        return [int(page) for layer in self._layers_in(pool) for page in self.page_table[layer, : self._n_pages[layer]]]

    def _layers_in(self, pool: PagePool) -> list[int]:
        return [layer for layer in range(self.n_layers) if self._pool_of(layer) is pool]

    @property
    def _pools(self) -> list[PagePool]:
        """The pools that hold pages of this sequence."""
        return list(dict.fromkeys(self._pool_of(layer) for layer in range(self.n_layers)))

    def _evicts_for_next(self, layer: int) -> bool:
        """Whether the layer is over its share of the computed tokens by one or more (papers: int(len - T * kept) > 0), and not
        below the floor.
        """
        assert self._growth is not None
        n_held = self.kv_len[layer]
        over = int(n_held - self.num_computed_tokens * self._growth[layer]) > 0
        return over and n_held >= self._floor and bool(self._reuse_order[layer])

    def _next_slots(self, n_new: int) -> Ints:
        """Pool slots [L, n_new] behind the cached tokens; of no meaning where there is no page for them."""
        index_LN = self.kv_len[:, None] + np.arange(n_new)
        size, last = self.pool.page_size, self.page_table.shape[1] - 1
        pages_LN = np.take_along_axis(self.page_table, np.minimum(index_LN // size, last), axis=1)
        slots: Ints = pages_LN * size + index_LN % size
        return slots

    def _slots(self, layer: int, indices: range) -> Ints:
        """Pool slots of the sequence's cached tokens ``indices``."""
        index = np.arange(indices.start, indices.stop)
        slots: Ints = self.page_table[layer, index // self.pool.page_size] * self.pool.page_size + index % self.pool.page_size
        return slots

    def _grow_tables(self, n_pages: Ints) -> None:
        """Grow each layer l to ``n_pages[l]`` pages, or leave it if it has more. On ``CapacityError`` nothing has changed."""
        n_pages = np.maximum(n_pages, self._n_pages)
        more_L = n_pages - self._n_pages
        if not more_L.any():
            return
        in_pool = {pool: self._layers_in(pool) for pool in self._pools}
        taken: dict[PagePool, list[int]] = {}
        try:
            for pool, layers in in_pool.items():
                taken[pool] = pool.allocate(int(more_L[layers].sum()), self._owner_in[pool])
        except CapacityError:
            for pool, pages in taken.items():
                pool.release(pages)
            raise
        self._widen(int(n_pages.max()))
        for layer in range(self.n_layers):
            pages = taken[self._pool_of(layer)]
            self.page_table[layer, self._n_pages[layer] : n_pages[layer]] = pages[: more_L[layer]]
            del pages[: more_L[layer]]
        self._n_pages = n_pages

    def _widen(self, n_pages: int) -> None:
        """Make room for ``n_pages`` of a layer in the page table."""
        if n_pages > self.page_table.shape[1]:
            wider = np.full((self.n_layers, 2 * n_pages), -1, np.int64)
            wider[:, : self.page_table.shape[1]] = self.page_table
            self.page_table = wider


def pages_of_prompt(n_tokens: int, *, window: int, page_size: int) -> int:
    """The pages that a layer holds after reading ``n_tokens``, whole pages, of a prompt; ``window``: of its attention, or 0."""
    n_passed = max(0, n_tokens - (window - 1)) // page_size if window else 0
    return n_tokens // page_size - n_passed
