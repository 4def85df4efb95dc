"""Operations on one layer of one sequence whose cache is on the host: prompt attention, choosing, recalling, storing pages."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from threading import Event

import numpy as np

from trt_kv.plugins.kv_rows import dtype_of
from trt_kv.plugins.paging import Floats, Ints, Rows
from trt_kv.plugins.recall_attention.choice import best_pages, drifted_heads, summaries_of
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.runtime.backends.host.recall.background import Copies, Job, Work, join, lost_pages
from trt_kv.runtime.backends.host.recall.prompt_attention import attend_prompt
from trt_kv.runtime.backends.host.recall.store import HostTier
from trt_kv.runtime.backends.host.recall.working_set import HEAD, NO_PAGE, PAGE, SLOT, Prefetch, WorkingSet, in_turn, moves_to
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.statistics import RecallStatistics
from trt_kv.runtime.trace import Trace

STAGING_SHARE = 0.25
"""Staging slots as a share of the slots of chosen pages. They can be filled while attention reads the others."""


def staging_slots(n_chosen: int) -> int:
    """Number of slots of a working set in addition to those of its ``n_chosen`` pages."""
    return int(np.ceil(STAGING_SHARE * n_chosen))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How pages are chosen in one layer of one step: the node's attributes, the budget, the sequence's host pages in order."""

    limits: PageLimits
    budget: int
    tau: float
    pooling: int
    softmax_scale: float
    pages: Ints

    @property
    def looks_ahead(self) -> bool:
        """Whether a step may use pages chosen with the previous query: not with tau > 1, as a cosine is at most 1."""
        return self.tau <= 1.0

    def n_chosen(self, n_tokens: int) -> int:
        return min(self.limits.n_chosen(self.budget), len(self.limits.choosable(n_tokens)))


class LayerStreams:
    """The two tiers, and the operations on working sets. Its only state of sequences are the summaries of their host pages."""

    def __init__(
        self,
        host: HostTier,
        device: HostKvPool,
        copies: Copies,
        statistics: RecallStatistics,
        trace: Trace,
        *,
        summary_rows: int,
    ) -> None:
        self.host = host
        self.device = device
        self.copies = copies
        self.statistics = statistics
        self.trace = trace
        shape = (host.n_pages, device.kv.shape[2], summary_rows, device.kv.shape[4])
        self.summaries: Rows = np.empty(shape, device.kv.dtype)

    def fork(self, working_set: WorkingSet, twin: WorkingSet, pages: Ints, twin_pages: Ints) -> None:
        """Copy one layer of a sequence from its host pages ``pages`` to ``twin`` and the new host pages ``twin_pages``."""
        self.join(working_set)
        n_full = working_set.n_tokens // working_set.limits.page_size
        for page, twin_page in zip(pages[:n_full], twin_pages, strict=False):
            self.write_pages([twin_page], self.read_pages(np.array([page])))
        self.summaries[twin_pages] = self.summaries[pages]
        twin.copy_from(working_set)

    def read_prompt(
        self,
        working_set: WorkingSet,
        choice: Choice,
        q: Floats,
        k: Floats,
        v: Floats,
        summary: int,
        *,
        scale: float,
        soft_cap: float,
    ) -> tuple[Floats, Floats]:
        """Causal attention of a prompt's chunk, (out, lse). Full pages are written to the host in the background."""
        self.join(working_set)
        size = choice.limits.page_size
        n_before = working_set.n_tokens
        n_cached = n_before + len(q)
        first, full = n_before // size, n_cached // size
        block = working_set.block_with(k, v)
        with self.trace.span("attention of a chunk"):
            earlier = choice.pages[:first]
            out, lse = attend_prompt(q, n_cached, earlier, block, self.read_pages, scale=scale, soft_cap=soft_cap)
        working_set.place(block, n_cached)
        working_set.query_HD, working_set.ranked_KC = q[-1].copy(), None
        self.summaries[choice.pages[first:full]] = summaries_of(block[: full - first, 0], summary, dtype_of(self.summaries))
        self._write_behind(working_set, choice.pages[first:full], block[: full - first])
        return out, lse

    def before_attention(
        self, layer: int, working_set: WorkingSet, choice: Choice, q: Floats, k: Floats, v: Floats, summary: int
    ) -> np.ndarray:
        """Append a generated token, test drift, and recall pages that are needed now. Returns which KV heads were corrected,
        [K] bool.
        """
        prefetch = self.join(working_set)
        size = choice.limits.page_size
        working_set.append(k, v)
        n_tokens = working_set.n_tokens
        if n_tokens % size == 0:
            number = n_tokens // size - 1
            page = self.device.kv[working_set.page_of(number)][None]
            self.summaries[choice.pages[number:]] = summaries_of(page[:, 0], summary, dtype_of(self.summaries))
            self._write_behind(working_set, choice.pages[number:], page)
        drifted_K = drifted_heads(q, working_set.query_HD, len(k), choice.tau)
        n_moved = 0
        if working_set.chosen_KC.shape[1] != choice.n_chosen(n_tokens) and not drifted_K.all():
            n_moved = self._recall_at_once(working_set, choice, ~drifted_K)
        working_set.query_HD, working_set.ranked_KC = q.copy(), None
        if drifted_K.any():
            n_moved += self._recall_at_once(working_set, choice, drifted_K)
        n_ahead = prefetch.n_moved if prefetch is not None else 0
        row = choice.pages[:1]
        self.statistics.count(layer, row, drifted_K[None], n_moved_ahead=n_ahead, n_moved_at_once=n_moved)
        return drifted_K

    def _recall_at_once(self, working_set: WorkingSet, choice: Choice, heads_K: np.ndarray) -> int:
        """Choose pages with the working set's query for some heads, and copy those that are missing; returns their number."""
        with self.trace.span("recall at once"):
            n_chosen = choice.n_chosen(working_set.n_tokens)
            working_set.make_room(n_chosen + staging_slots(n_chosen))
            wanted_KC = self._choose(working_set.query_HD, choice, working_set.n_tokens)
            working_set.ranked_KC = wanted_KC
            if working_set.chosen_KC.shape[1] != n_chosen:
                working_set.chosen_KC = np.full_like(wanted_KC, NO_PAGE)
            heads = np.flatnonzero(heads_K)
            working_set.chosen_KC[heads] = wanted_KC[heads]
            moves = moves_to(wanted_KC, working_set.held_KS, wanted_KC[:, :0], heads)
            try:
                self._bring(working_set, choice.pages, moves, working_set.held_KS)
            except OSError as error:
                raise lost_pages("the KV cache on the host cannot be read or written", error) from error
            return len(moves)

    def recall_ahead(self, working_set: WorkingSet, choice: Choice, prefetches: list[Prefetch]) -> None:
        """Submit the prefetch for the next step, which has one token more.

        If any KV head was corrected, pages have been ranked with this query for all heads. That choice is used again unless the
        next step has other pages to choose from.
        """
        if not choice.looks_ahead:
            return
        n_next = working_set.n_tokens + 1
        n_chosen = choice.n_chosen(n_next)
        working_set.make_room(n_chosen + staging_slots(n_chosen))
        prefetch = Prefetch(held_KS=working_set.held_KS.copy())
        same_pages = choice.limits.choosable(n_next) == choice.limits.choosable(working_set.n_tokens)
        ranked_KC = working_set.ranked_KC if same_pages else None
        prefetch.chosen_KC = self._choose(working_set.query_HD, choice, n_next) if ranked_KC is None else ranked_KC
        moves = moves_to(prefetch.chosen_KC, prefetch.held_KS, working_set.chosen_KC, range(len(prefetch.held_KS)))
        prefetch.n_moved = len(moves)

        def work() -> Iterator[Event | None]:
            for step in in_turn(moves, prefetch):
                if isinstance(step, Event):
                    with self.trace.span("waiting for attention"):
                        yield step
                    continue
                self._bring(working_set, choice.pages, step, prefetch.held_KS)
                yield None

        prefetches.append(prefetch)
        working_set.prefetch = prefetch
        self._submit(working_set, "recalling pages", work)

    def _choose(self, query_HD: Floats, choice: Choice, n_tokens: int) -> Ints:
        """The page numbers that each KV head chooses for a query, in a step with ``n_tokens`` tokens: [K, C]."""
        between = choice.limits.choosable(n_tokens)
        with self.trace.span("choose pages"):
            return between.start + best_pages(
                query_HD,
                choice.pages[between.start : between.stop],
                self.summaries,
                choice.n_chosen(n_tokens),
                choice.pooling,
                choice.softmax_scale,
            )

    def _bring(self, working_set: WorkingSet, pages: Ints, moves_M4: Ints, held_KS: Ints) -> None:
        """Copy page-heads into their slots, which are marked as empty during the copies."""
        heads, numbers, slots = moves_M4[:, HEAD], moves_M4[:, PAGE], moves_M4[:, SLOT]
        held_KS[heads, slots] = NO_PAGE
        self.host.read_heads(pages[numbers], heads, self.device.kv, working_set.device_pages(slots))
        held_KS[heads, slots] = numbers

    def _write_behind(self, working_set: WorkingSet, pages: Ints, block: Rows) -> None:
        """Store full pages on the host in the background. ``block`` must not change before the layer is joined again."""
        if not len(pages):
            return
        self.statistics.pages_written += len(pages)

        def work() -> Iterator[Event | None]:
            for page, kv_2KPW in zip(pages, block, strict=True):
                self.host.write(int(page), kv_2KPW)
                yield None

        self._submit(working_set, "storing pages", work)

    def _submit(self, working_set: WorkingSet, what: str, work: Work) -> None:
        def traced() -> Iterator[Event | None]:
            with self.trace.span(what):
                yield from work()

        working_set.lane = Job(what, traced, after=working_set.lane)
        self.copies.submit(working_set.lane)

    def join(self, working_set: WorkingSet) -> Prefetch | None:
        """Wait for all jobs of this layer and sequence. Applies and returns the prefetch, if there was one."""
        if working_set.failure is not None:
            raise working_set.failure
        if working_set.lane is None:
            return None
        begin = time.perf_counter()
        with self.trace.span("join"):
            join(self.copies, working_set.lane)
        self.statistics.waited_ms += 1e3 * (time.perf_counter() - begin)
        working_set.lane = None
        prefetch, working_set.prefetch = working_set.prefetch, None
        if prefetch is not None:
            working_set.held_KS, working_set.chosen_KC = prefetch.held_KS, prefetch.chosen_KC
        return prefetch

    def write_pages(self, pages: Iterable[int], kv_M2KPW: Rows) -> None:
        """Write pages to the host synchronously; ``RecallError`` if they cannot be written."""
        try:
            for page, kv_2KPW in zip(pages, kv_M2KPW, strict=True):
                self.host.write(int(page), kv_2KPW)
        except OSError as error:
            raise lost_pages("the KV cache on the host cannot be read or written", error) from error

    def read_pages(self, pages: Ints) -> Rows:
        """Read pages from the host synchronously; ``RecallError`` if they cannot be read."""
        try:
            return self.host.read_pages([int(page) for page in pages])
        except OSError as error:
            raise lost_pages("the KV cache on the host cannot be read or written", error) from error
