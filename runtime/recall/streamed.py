"""RecallAttention over two tiers: the cache on the host, working sets on the device, copies while the model computes.

Order of events in one layer of one decode step i of one sequence (``docs/decisions/0016-streamed-recall.md`` has the picture):

    main thread                                          background
    join: all jobs of this layer have ended              ...
    take over what ticket i-1 brought
    append the token; test drift
    recall at once for heads that drifted
    submit ticket i (with this step's query) --------->  choose pages for step i+1
    attention over the working set                       fill slots that attention does not read
    attention_done ----------------------------------->  fill the slots of pages that are not wanted any more
    next layers, next step ...

Every edge is an event or the order of one thread. A job fails by itself; its error is raised where its layer joins it, in the
sequence it belongs to.
"""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np

from trt_kv.errors import RecallError
from trt_kv.plugins.adaptive_budget.cpu import budget_of_row
from trt_kv.plugins.attention_cpu import attend_one
from trt_kv.plugins.paging import Floats, Ints, pages_of
from trt_kv.plugins.recall_attention.choice import best_pages, drifted_heads, summaries_of
from trt_kv.plugins.recall_attention.page_counts import PageLimits, budget_tokens
from trt_kv.plugins.registry import Kernel
from trt_kv.runtime.kv_pool import KvPool
from trt_kv.runtime.recall.background import Copies, Job, join
from trt_kv.runtime.recall.host_tier import HostTier
from trt_kv.runtime.recall.prompt_attention import attend_prompt, last_query_row
from trt_kv.runtime.recall.statistics import RecallStatistics
from trt_kv.runtime.recall.working_set import NO_PAGE, Move, Ticket, WorkingSet, in_turn, moves_to
from trt_kv.runtime.trace import NO_TRACE, Trace

STAGING_SHARE = 0.25
"""Slots beside those of the chosen pages, as a share of these: so many can be filled while attention reads the others."""


def staging_slots(n_chosen: int) -> int:
    """Slots that a working set has beside those for ``n_chosen`` pages."""
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
        """Whether a step may use pages that were chosen by the query before: a cosine is at most 1."""
        return self.tau <= 1.0

    def n_chosen(self, n_tokens: int) -> int:
        return min(self.limits.n_chosen(self.budget), len(self.limits.choosable(n_tokens)))


class StreamedRecall:
    """Kernels with a memory: one ``WorkingSet`` per layer and sequence, known by the number of its first host page."""

    def __init__(
        self, host: HostTier, device: KvPool, copies: Copies, *, n_layers: int, finds_budgets: bool, trace: Trace = NO_TRACE
    ) -> None:
        """``finds_budgets``: AdaptiveBudget follows with a prompt's last chunk, so the first recall waits for what it finds."""
        self.host = host
        self.device = device
        self.trace = trace
        self.summaries = np.empty((host.n_pages, device.kv.shape[2], 2, device.kv.shape[4]), np.float32)
        self.statistics = RecallStatistics(
            n_layers=n_layers, n_kv_heads=device.kv.shape[2], page_head_bytes=host.page_bytes // device.kv.shape[2]
        )
        self.sets: dict[int, WorkingSet] = {}
        self._copies = copies
        self._finds_budgets = finds_budgets
        self._first_choices: dict[int, Choice] = {}
        """How the first step after a prompt chooses, but for a budget that has yet to be found."""

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        """What runs instead of the ops' own kernels."""
        return {"RecallAttention": self.attend, "AdaptiveBudget": self.find_budget}

    @property
    def used_bytes(self) -> dict[str, int]:
        """Bytes in use, exactly: pages on the host, pages on the device, summaries of the pages on the host."""
        summary_bytes = self.summaries.nbytes // max(1, len(self.summaries))
        n_host = self.host.n_pages - self.host.n_free
        return {"host": self.host.used_bytes, "device": self.device.used_bytes, "summaries": n_host * summary_bytes}

    def attend(
        self,
        *,
        q: Floats,
        k: Floats,
        v: Floats,
        cu_tokens: Ints,
        prompt_remaining: Ints,
        page_table: Ints,
        kv_len: Ints,
        prompt_len: Ints,
        found_budget: Ints,
        query_rows: Ints,
        layer: int,
        scale: float,
        page_size: int,
        kept_share: float,
        kept_tokens: int,
        sinks: int,
        recent: int,
        tau: float,
        summary: int,
        pooling: int,
        softmax_scale: float,
        **_states: Any,
    ) -> tuple[Floats, Floats, Ints]:
        """RecallAttention as its spec says; the states that the spec keeps in the pool are kept here."""
        out, lse = np.zeros(q.shape, np.float32), np.zeros(q.shape[:2], np.float32)
        corrected = np.zeros((kv_len.shape[1], k.shape[1]), np.int64)
        limits = PageLimits(page_size=page_size, sinks=sinks, recent=recent)
        decoding: list[tuple[int, Ints, int]] = []
        tickets: list[Ticket] = []
        try:
            for b in np.flatnonzero(np.diff(cu_tokens)):
                rows, n_cached = slice(cu_tokens[b], cu_tokens[b + 1]), int(kv_len[layer, b])
                row, last = int(query_rows[layer, b]), rows.stop - 1
                choice = Choice(
                    limits=limits,
                    budget=budget_tokens(int(prompt_len[b]), int(found_budget[layer, b]), kept_share, kept_tokens),
                    tau=tau,
                    pooling=pooling,
                    softmax_scale=softmax_scale,
                    pages=pages_of(page_table, layer, b, n_cached, page_size),
                )
                if row not in self.sets:
                    self.sets[row] = WorkingSet(self.device, limits)
                working_set = self.sets[row]
                try:
                    if prompt_remaining[last] >= 0:
                        out[rows], lse[rows] = self._read_prompt(working_set, choice, q[rows], k[rows], v[rows], summary, scale)
                        if prompt_remaining[last] == 0:
                            self._first_choices[row] = choice
                            if not self._finds_budgets:
                                self._recall_ahead(working_set, choice, tickets)
                    else:
                        corrected[b] = self._before_attention(layer, working_set, choice, q[last], k[last], v[last], summary)
                        attended_KT = working_set.attended()
                        n_left_out = len(choice.pages) - attended_KT.shape[1]
                        decoding.append((last, attended_KT, n_cached - n_left_out * page_size))
                        self._recall_ahead(working_set, choice, tickets)
                except RecallError as error:
                    working_set.failure = error
            if decoding:
                with self.trace.span("attention", layer=layer):
                    _attend(q, decoding, self.device.kv, scale, out, lse)
        finally:
            for ticket in tickets:
                ticket.attention_done.set()
        return out, lse, corrected

    def find_budget(
        self,
        *,
        q: Floats,
        lse: Floats,
        cu_tokens: Ints,
        evict: Ints,
        page_table: Ints,
        kv_len: Ints,
        layer: int,
        scale: float,
        page_size: int,
        threshold: float,
        sinks: int,
        recent: int,
        protected_in_norm: int,
        **_others: Any,
    ) -> tuple[Ints]:
        """AdaptiveBudget for row "query" and newest first, over the cache on the host."""
        budget = kv_len[layer].copy()
        for b in np.flatnonzero((evict == 1) & (np.diff(cu_tokens) > 0)):
            n_cached, last, row = int(kv_len[layer, b]), int(cu_tokens[b + 1]) - 1, int(page_table[layer, b, 0])
            working_set, choice = self.sets[row], self._first_choices[row]
            try:
                if n_cached > sinks + recent:
                    self._join(working_set)
                    full = choice.pages[: n_cached // page_size]
                    open_page = self.device.kv[[working_set.page_of(n_cached // page_size)]]
                    row_HS = last_query_row(q[last], lse[last], n_cached, full, open_page, self._read_pages, scale)
                    slots_KS = np.broadcast_to(np.arange(n_cached), (self.device.kv.shape[2], n_cached))
                    protected_KP = np.concatenate([slots_KS[:, :sinks], slots_KS[:, n_cached - recent :]], axis=1)
                    candidates_KC = slots_KS[:, sinks : n_cached - recent][:, ::-1]
                    budget[b] = budget_of_row(row_HS, protected_KP, candidates_KC, threshold, protected_in_norm)
                tickets: list[Ticket] = []
                self._recall_ahead(working_set, dataclasses.replace(choice, budget=int(budget[b])), tickets)
            except RecallError as error:
                working_set.failure = error
                continue
            for ticket in tickets:
                ticket.attention_done.set()
        return (budget,)

    def fork(self, pages: Ints, twin_pages: Ints) -> None:
        """Copy one layer of a sequence, whose host pages are ``pages``, to the new host pages ``twin_pages``."""
        working_set = self.sets[int(pages[0])]
        self._join(working_set)
        n_full = working_set.n_tokens // working_set.limits.page_size
        for page, twin_page in zip(pages[:n_full], twin_pages, strict=False):
            self._write_now(int(twin_page), self._read_pages(np.array([page]))[0])
        self.summaries[twin_pages] = self.summaries[pages]
        self.sets[int(twin_pages[0])] = working_set.fork()

    def release(self, rows: Sequence[int]) -> None:
        """Forget layers of sequences: wait for their jobs, whatever became of them, and free their device pages."""
        for row in rows:
            working_set = self.sets.pop(row, None)
            self._first_choices.pop(row, None)
            if working_set is not None:
                if working_set.ticket is not None:
                    working_set.ticket.attention_done.set()  # a step that was interrupted may not have come to it
                if working_set.lane is not None:
                    self._copies.settle(working_set.lane)
                working_set.release()

    def reclaim(self) -> None:
        """After Ctrl-C in the middle of a step: what no living sequence holds is free again."""
        held = set(self.host.held_pages())
        self.release([row for row in self.sets if row not in held])
        self.host.reclaim()

    def close(self) -> None:
        """Release everything and let go of the host tier."""
        self.release(list(self.sets))
        self._copies.close()
        self.host.close()

    def _read_prompt(
        self, working_set: WorkingSet, choice: Choice, q: Floats, k: Floats, v: Floats, summary: int, scale: float
    ) -> tuple[Floats, Floats]:
        """A chunk attends to everything before it, and its full pages go to the host behind it."""
        self._join(working_set)
        size = choice.limits.page_size
        n_before = working_set.n_tokens
        n_cached = n_before + len(q)
        first, full = n_before // size, n_cached // size
        block = working_set.block_with(k, v)
        with self.trace.span("attention of a chunk"):
            out, lse = attend_prompt(q, n_cached, choice.pages[:first], block, self._read_pages, scale)
        working_set.place(block, n_cached)
        working_set.query_HD = q[-1].copy()
        self.summaries[choice.pages[first:full]] = summaries_of(block[: full - first, 0], summary)
        self._write_behind(working_set, choice.pages[first:full], block[: full - first])
        return out, lse

    def _before_attention(
        self, layer: int, working_set: WorkingSet, choice: Choice, q: Floats, k: Floats, v: Floats, summary: int
    ) -> np.ndarray:
        """Everything that decides what a generated token attends to; which KV heads were corrected, [K] bool."""
        ticket = self._join(working_set)
        size = choice.limits.page_size
        working_set.append(k, v)
        n_tokens = working_set.n_tokens
        if n_tokens % size == 0:
            number = n_tokens // size - 1
            page = self.device.kv[working_set.page_of(number)][None]
            self.summaries[choice.pages[number:]] = summaries_of(page[:, 0], summary)
            self._write_behind(working_set, choice.pages[number:], page)
        drifted_K = drifted_heads(q, working_set.query_HD, len(k), choice.tau)
        n_moved = 0
        if working_set.chosen_KC.shape[1] != choice.n_chosen(n_tokens) and not drifted_K.all():
            n_moved = self._recall_at_once(working_set, choice, ~drifted_K)
        working_set.query_HD = q.copy()
        if drifted_K.any():
            n_moved += self._recall_at_once(working_set, choice, drifted_K)
        counts = self.statistics
        counts.layer_steps_L[layer] += 1
        counts.corrected_LK[layer] += drifted_K
        counts.corrected_layer_steps_L[layer] += drifted_K.any()
        counts.moved_ahead_L[layer] += ticket.n_moved if ticket is not None else 0
        counts.moved_at_once_L[layer] += n_moved
        return drifted_K

    def _recall_at_once(self, working_set: WorkingSet, choice: Choice, heads_K: np.ndarray) -> int:
        """Choose pages with the working set's query for some heads, and bring them; how many were missing."""
        with self.trace.span("recall at once"):
            n_chosen = choice.n_chosen(working_set.n_tokens)
            working_set.make_room(n_chosen + staging_slots(n_chosen))
            wanted_KC = self._choose(working_set.query_HD, choice, working_set.n_tokens)
            if working_set.chosen_KC.shape[1] != n_chosen:
                working_set.chosen_KC = np.full_like(wanted_KC, NO_PAGE)
            heads = np.flatnonzero(heads_K)
            working_set.chosen_KC[heads] = wanted_KC[heads]
            moves = moves_to(wanted_KC, working_set.held_KS, wanted_KC[:, :0], heads)
            try:
                for move in moves:
                    self._bring(working_set, choice.pages, move, working_set.held_KS)
            except OSError as error:
                raise _lost(error) from error
            return len(moves)

    def _recall_ahead(self, working_set: WorkingSet, choice: Choice, tickets: list[Ticket]) -> None:
        """Submit the ticket for the next step, which will have one token more."""
        if not choice.looks_ahead:
            return
        n_next = working_set.n_tokens + 1
        n_chosen = choice.n_chosen(n_next)
        working_set.make_room(n_chosen + staging_slots(n_chosen))
        ticket = Ticket(held_KS=working_set.held_KS.copy())
        query_HD, attended_KC = working_set.query_HD, working_set.chosen_KC

        def work() -> Iterator[Event | None]:
            with self.trace.span("choose pages"):
                ticket.chosen_KC = self._choose(query_HD, choice, n_next)
            moves = moves_to(ticket.chosen_KC, ticket.held_KS, attended_KC, range(len(ticket.held_KS)))
            ticket.n_moved = len(moves)
            for step in in_turn(moves, ticket):
                if isinstance(step, Event):
                    with self.trace.span("waiting for attention"):
                        yield step
                    continue
                self._bring(working_set, choice.pages, step, ticket.held_KS)
                yield None

        tickets.append(ticket)
        working_set.ticket = ticket
        self._submit(working_set, "recalling pages", work)

    def _choose(self, query_HD: Floats, choice: Choice, n_tokens: int) -> Ints:
        """The page numbers that each KV head wants for a query, in a step with ``n_tokens``: [K, C]."""
        between = choice.limits.choosable(n_tokens)
        return between.start + best_pages(
            query_HD,
            choice.pages[between.start : between.stop],
            self.summaries,
            choice.n_chosen(n_tokens),
            choice.pooling,
            choice.softmax_scale,
        )

    def _bring(self, working_set: WorkingSet, pages: Ints, move: Move, held_KS: Ints) -> None:
        """Copy one page-head into its slot; the slot holds nothing while that goes on."""
        held_KS[move.head, move.slot] = -1
        self.host.read_head(int(pages[move.page]), move.head, working_set.slot(move.slot, move.head))
        held_KS[move.head, move.slot] = move.page

    def _write_behind(self, working_set: WorkingSet, pages: Ints, block: Floats) -> None:
        """Store full pages on the host; ``block`` is not overwritten before the layer is joined again."""
        if not len(pages):
            return
        self.statistics.pages_written += len(pages)

        def work() -> Iterator[Event | None]:
            for page, kv_2KPD in zip(pages, block, strict=True):
                self.host.write(int(page), kv_2KPD)
                yield None

        self._submit(working_set, "storing pages", work)

    def _submit(self, working_set: WorkingSet, what: str, work: Any) -> None:
        def traced() -> Iterator[Event | None]:
            with self.trace.span(what):
                yield from work()

        working_set.lane = Job(what, traced, after=working_set.lane)
        self._copies.submit(working_set.lane)

    def _join(self, working_set: WorkingSet) -> Ticket | None:
        """Wait until every job of this layer and sequence has ended; take over and return what a ticket brought."""
        if working_set.failure is not None:
            raise working_set.failure
        if working_set.lane is None:
            return None
        begin = time.perf_counter()
        with self.trace.span("join"):
            join(self._copies, working_set.lane)
        self.statistics.waited_ms += 1e3 * (time.perf_counter() - begin)
        working_set.lane = None
        ticket, working_set.ticket = working_set.ticket, None
        if ticket is not None:
            working_set.held_KS, working_set.chosen_KC = ticket.held_KS, ticket.chosen_KC
        return ticket

    def _write_now(self, page: int, kv_2KPD: Floats) -> None:
        try:
            self.host.write(page, kv_2KPD)
        except OSError as error:
            raise _lost(error) from error

    def _read_pages(self, pages: Ints) -> Floats:
        """Pages from the host, now; ``RecallError`` where they cannot be read."""
        try:
            return self.host.read_pages([int(page) for page in pages])
        except OSError as error:
            raise _lost(error) from error


def _lost(error: OSError) -> RecallError:
    return RecallError(
        "the KV cache on the host cannot be read or written",
        got=str(error),
        fix="this request is lost, others are not; check the disk and the memory of the host tier, then send it again",
    )


def _attend(q: Floats, decoding: Sequence[tuple[int, Ints, int]], kv: Floats, scale: float, out: Floats, lse: Floats) -> None:
    """Attention of one query per entry: (row of q, device pages [K, T], tokens in them)."""
    width = max(pages_KT.shape[1] for _, pages_KT, _ in decoding)
    table_BKT = np.zeros((len(decoding), kv.shape[2], width), np.int64)
    for i, (_, pages_KT, _) in enumerate(decoding):
        table_BKT[i, :, : pages_KT.shape[1]] = pages_KT
    rows, n_tokens = (np.array([entry[at] for entry in decoding]) for at in (0, 2))
    attend_one(q, rows, table_BKT, n_tokens, kv, np.float32(scale), out, lse)
