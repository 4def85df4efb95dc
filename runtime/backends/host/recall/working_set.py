"""One layer of one sequence on the device: sinks, the newest pages, and slots for pages that were recalled.

K KV heads, P page size, D head size, W length of a stored row, S slots, C chosen pages. A page number is the index of a page
within its sequence; device pages and host pages are indices into the two pools. A slot is a device page in which each KV head
may hold its part of a different page.
"""

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from trt_kv.errors import TrtKvError
from trt_kv.plugins.attention_cpu import write_rows
from trt_kv.plugins.jit import njit
from trt_kv.plugins.paging import Floats, Ints, Rows
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.runtime.backends.host.recall.background import Job
from trt_kv.runtime.backends.host.store import HostKvPool

NO_PAGE = -1
HEAD, PAGE, SLOT, WAITS = range(4)
"""Columns of moves, copies of page-heads: page ``PAGE`` of the sequence into slot ``SLOT`` of KV head ``HEAD``. ``WAITS``: 1 if
the copy waits for the attention of the step that it overlaps with, which reads the slot.
"""
MOVES_AT_A_TIME = 64
"""Copies between two points at which a job can be paused."""


@dataclass(kw_only=True)
class Prefetch:
    """One layer's recall for the next step: page lists of its own, and the event that ends the current step's attention.

    The working set adopts ``held_KS`` and ``chosen_KC`` when the prefetch is joined, and not before.
    """

    attention_done: threading.Event = field(default_factory=threading.Event)
    held_KS: Ints = field(default_factory=lambda: np.empty((0, 0), np.int64))
    chosen_KC: Ints = field(default_factory=lambda: np.empty((0, 0), np.int64))
    n_moved: int = 0


class WorkingSet:
    """The part of one layer of one sequence that is on the device.

    Each page ``j`` below ``limits.n_sinks`` has a device page of its own. The newest pages form a ring: page ``j`` is in device
    page ``j % n_newest`` until page ``j + n_newest`` begins, since no step attends to both.
    """

    def __init__(self, device: HostKvPool, limits: PageLimits) -> None:
        self.limits = limits
        self.n_tokens = 0
        self.query_HD: Floats = np.empty((0, 0), np.float32)
        """The query of the last token."""
        self.lane: Job | None = None
        """The last job on this layer and sequence: when it has ended, all have."""
        self.prefetch: Prefetch | None = None
        self.failure: TrtKvError | None = None
        n_kv_heads = device.kv.shape[2]
        self.held_KS: Ints = np.empty((n_kv_heads, 0), np.int64)
        """The page number that each slot holds for each KV head."""
        self.chosen_KC: Ints = np.empty((n_kv_heads, 0), np.int64)
        """The page numbers chosen with ``query_HD``, ascending."""
        self.ranked_KC: Ints | None = None
        """The page numbers that every KV head would choose with ``query_HD`` in the step of its token; None: not computed."""
        self._device = device
        self._owner = device.new_owner()
        self._sinks: list[int] = []
        self._newest: list[int] = []
        self._slots: list[int] = []

    def open(self) -> None:
        """Allocate device pages for sinks and newest pages; ``CapacityError`` if too few are free."""
        own = self._device.allocate(self.limits.n_sinks + self.limits.n_newest, self._owner)
        self._sinks, self._newest = own[: self.limits.n_sinks], own[self.limits.n_sinks :]

    @property
    def pages(self) -> list[int]:
        """The device pages of this working set."""
        return [*self._sinks, *self._newest, *self._slots]

    @property
    def n_held_tokens(self) -> int:
        """Capacity of the device pages, in tokens."""
        return len(self.pages) * self.limits.page_size

    def page_of(self, number: int) -> int:
        """The device page of a sink or one of the newest pages."""
        return self._sinks[number] if number < self.limits.n_sinks else self._newest[number % self.limits.n_newest]

    def append(self, k_KD: Floats, v_KD: Floats) -> None:
        """Write one token to the open page, the one that is not full yet."""
        number, offset = divmod(self.n_tokens, self.limits.page_size)
        page = self.page_of(number)
        write_rows(self._device.kv, np.array([page * self.limits.page_size + offset]), k_KD[None], v_KD[None])
        self.n_tokens += 1

    def block_with(self, k_NKD: Floats, v_NKD: Floats) -> Rows:
        """The open page's tokens and then the new ones, as pages [n, 2, K, P, W]; undefined after the last token."""
        size = self.limits.page_size
        n_open = self.n_tokens % size
        n_pages = -(-(n_open + len(k_NKD)) // size)
        block = np.empty((n_pages, *self._device.kv.shape[1:]), self._device.kv.dtype)
        if n_open:
            block[0] = self._device.kv[self.page_of(self.n_tokens // size)]
        write_rows(block, n_open + np.arange(len(k_NKD)), k_NKD, v_NKD)
        return block

    def place(self, block: Rows, n_tokens: int) -> None:
        """Copy the sinks and the newest pages of ``block``, which ends with token ``n_tokens``, to their device pages."""
        first = self.n_tokens // self.limits.page_size
        end = first + len(block)
        for number in range(first, end):
            if number < self.limits.n_sinks or number >= end - self.limits.n_newest:
                self._device.kv[self.page_of(number)] = block[number - first]
        self.n_tokens = n_tokens

    def attended(self) -> Ints:
        """The device pages that each KV head attends to now, in order of position: [K, T]."""
        pages_KT: Ints = attended_pages(
            self.chosen_KC,
            self.held_KS,
            np.array(self._slots, np.int64),
            np.array(self._sinks, np.int64),
            np.array(self._newest, np.int64),
            self.limits.first_newest(self.n_tokens),
            -(-self.n_tokens // self.limits.page_size),
        )
        return pages_KT

    def make_room(self, n_slots: int) -> None:
        """Grow to at least ``n_slots`` slots; ``CapacityError`` if the device has too few free pages."""
        n_more = n_slots - len(self._slots)
        if n_more > 0:
            self._slots += self._device.allocate(n_more, self._owner)
            fresh_KS = np.full((len(self.held_KS), n_more), NO_PAGE)
            self.held_KS = np.concatenate([self.held_KS, fresh_KS], axis=1)

    def device_pages(self, slots: Ints) -> Ints:
        """The device pages of slots."""
        return np.array(self._slots, np.int64)[slots]

    def copy_from(self, original: "WorkingSet") -> None:
        """Hold the same pages as ``original`` in device pages of its own. No job of either may be running."""
        self.open()
        self.make_room(len(original._slots))
        self.n_tokens, self.query_HD = original.n_tokens, original.query_HD
        self.held_KS, self.chosen_KC = original.held_KS.copy(), original.chosen_KC.copy()
        self._device.kv[self.pages] = self._device.kv[original.pages]

    def release(self) -> None:
        """Free the device pages. No job may be running."""
        self._device.release_owner(self._owner)
        self._sinks, self._newest, self._slots = [], [], []


@njit(nogil=True)
def attended_pages(
    chosen_KC: Ints, held_KS: Ints, slots_S: Ints, sinks: Ints, newest: Ints, first_newest: int, n_pages: int
) -> Ints:
    """The device pages [K, T] of the sinks, of the chosen pages, every one of which is held, and of the newest pages."""
    n_kv_heads, n_chosen = chosen_KC.shape
    n_sinks = min(len(sinks), n_pages)
    first = max(first_newest, n_sinks)
    pages_KT = np.empty((n_kv_heads, n_sinks + n_chosen + n_pages - first), np.int64)
    for head in range(n_kv_heads):
        pages_KT[head, :n_sinks] = sinks[:n_sinks]
        order_S = np.argsort(held_KS[head])
        ordered_S = held_KS[head][order_S]
        at_C = np.searchsorted(ordered_S, chosen_KC[head])
        for c in range(n_chosen):
            if at_C[c] == len(ordered_S) or ordered_S[at_C[c]] != chosen_KC[head, c]:
                raise IndexError("a chosen page is not held")
            pages_KT[head, n_sinks + c] = slots_S[order_S[at_C[c]]]
        for page in range(first, n_pages):
            pages_KT[head, n_sinks + n_chosen + page - first] = newest[page % len(newest)]
    return pages_KT


def moves_to(wanted_KC: Ints, held_KS: Ints, attended_KC: Ints, heads: Iterable[int]) -> Ints:
    """The copies of page-heads after which each of ``heads`` holds its wanted pages, as rows (head, page, slot, waits): only
    missing pages are copied. [M, 4]

    Slots whose page is not wanted are overwritten: first those that the running step does not attend to, then the others.
    Copies into these come last: they wait for attention. Wanted and attended pages are in ascending order.
    """
    found_M4: Ints = planned_moves(wanted_KC, held_KS, attended_KC, np.fromiter(heads, np.int64))
    return found_M4[np.argsort(found_M4[:, WAITS], kind="stable")]


@njit(nogil=True)
def planned_moves(wanted_KC: Ints, held_KS: Ints, attended_KC: Ints, heads: Ints) -> Ints:
    """Rows (head, page, slot, waits) of ``moves_to``, head by head. Releases the GIL, so that the model computes meanwhile."""
    n_wanted, n_slots, n_attended = wanted_KC.shape[1], held_KS.shape[1], attended_KC.shape[1]
    moves_M4 = np.empty((len(heads) * n_wanted, 4), np.int64)
    n_moves = 0
    free = np.empty(n_slots, np.int64)
    for head in heads:
        wanted, held, attended = wanted_KC[head], held_KS[head], attended_KC[head]
        n_free = n_unread = 0
        for reads in range(2):
            for slot in range(n_slots):
                at = np.searchsorted(wanted, held[slot])
                if at < n_wanted and wanted[at] == held[slot]:
                    continue
                at = np.searchsorted(attended, held[slot])
                if (at < n_attended and attended[at] == held[slot]) == (reads == 1):
                    free[n_free] = slot
                    n_free += 1
            if reads == 0:
                n_unread = n_free
        ordered = np.sort(held)
        n_missing = 0
        for page in wanted:
            at = np.searchsorted(ordered, page)
            if at < n_slots and ordered[at] == page:
                continue
            moves_M4[n_moves, 0] = head
            moves_M4[n_moves, 1] = page
            moves_M4[n_moves, 2] = free[n_missing]
            moves_M4[n_moves, 3] = n_missing >= n_unread
            n_missing += 1
            n_moves += 1
    return moves_M4[:n_moves]


def in_turn(moves_M4: Ints, prefetch: Prefetch) -> Iterator[Ints | threading.Event]:
    """The moves of a prefetch, some at a time; before the first ones into slots that attention reads, the event to wait for."""
    n_unread = int(np.count_nonzero(moves_M4[:, WAITS] == 0))
    for moves, waits in ((moves_M4[:n_unread], False), (moves_M4[n_unread:], True)):
        if waits and len(moves):
            yield prefetch.attention_done
        for first in range(0, len(moves), MOVES_AT_A_TIME):
            yield moves[first : first + MOVES_AT_A_TIME]
