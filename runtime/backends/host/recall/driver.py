"""RecallAttention over two tiers: the cache on the host, working sets on the device, copies while the model computes.

Order of events in one layer of one decode step i of one sequence (``docs/decisions/0016-streamed-recall.md`` has the picture):

    main thread                                          background
    join: wait for all jobs of this layer                ...
    apply the results of prefetch i-1
    append the token; test drift
    recall synchronously for heads that drifted
    submit prefetch i (with this step's query) --------->  choose pages for step i+1
    attention over the working set                       fill slots that attention does not read
    attention_done ----------------------------------->  fill slots that attention has read
    next layers, next step ...

Every edge is an event or program order within a thread. A failing job affects only its own sequence: its error is raised when
its layer joins it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.errors import RecallError
from trt_kv.plugins.adaptive_budget.arguments import Arguments as BudgetArguments
from trt_kv.plugins.adaptive_budget.cpu import budget_of_row
from trt_kv.plugins.attention_cpu import attend_tables
from trt_kv.plugins.paging import Floats, Ints, Rows, pages_of
from trt_kv.plugins.recall_attention.arguments import Arguments as RecallArguments
from trt_kv.plugins.recall_attention.page_counts import PageLimits, budget_tokens
from trt_kv.plugins.registry import Implementation, Kernel, called_by_name
from trt_kv.runtime.backends.host.recall.background import Copies
from trt_kv.runtime.backends.host.recall.layer import Choice, LayerStreams
from trt_kv.runtime.backends.host.recall.prompt_attention import last_query_row
from trt_kv.runtime.backends.host.recall.store import HostTier
from trt_kv.runtime.backends.host.recall.working_set import Prefetch, WorkingSet, planned_moves
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.statistics import RecallStatistics
from trt_kv.runtime.trace import NO_TRACE, Trace


class StreamedRecall:
    """Stateful kernels of RecallAttention and AdaptiveBudget: one ``WorkingSet`` per layer and sequence, identified by the
    number of the layer's first host page.
    """

    in_memory = False

    def __init__(
        self,
        host: HostTier,
        device: HostKvPool,
        copies: Copies,
        *,
        n_layers: int,
        finds_budgets: bool,
        summary_rows: int = 2,
        trace: Trace = NO_TRACE,
    ) -> None:
        """``finds_budgets``: AdaptiveBudget runs after a prompt's last chunk, so the first recall waits for its result.
        ``summary_rows``: as ``page_counts.summary_rows`` counts them.
        """
        self.host = host
        self.device = device
        self.statistics = RecallStatistics(
            n_layers=n_layers,
            n_kv_heads=device.kv.shape[2],
            page_head_bytes=host.page_bytes // device.kv.shape[2],
            n_pages=host.n_pages,
        )
        self.sets: dict[int, WorkingSet] = {}
        self._copies = copies
        self._streams = LayerStreams(host, device, copies, self.statistics, trace, summary_rows=summary_rows)
        self._trace = trace
        self._finds_budgets = finds_budgets
        self._first_choices: dict[int, Choice] = {}
        """Choice of the first step after a prompt, before AdaptiveBudget replaces its budget; by first host page."""

    @property
    def summaries(self) -> Rows:
        """Summaries (lo and hi, and codes) of the keys of every full host page, stored as the pool's type: [M, K, R, W]."""
        return self._streams.summaries

    @summaries.setter
    def summaries(self, summaries: Rows) -> None:
        """Set the summaries of a host tier that was filled earlier."""
        self._streams.summaries = summaries

    @property
    def kernels(self) -> Mapping[str, Kernel]:
        """Kernels that replace the ops' own, by op name."""
        own: dict[str, Implementation] = {"RecallAttention": self.attend, "AdaptiveBudget": self.find_budget}
        return {op: called_by_name(op, run) for op, run in own.items()}

    @property
    def used_bytes(self) -> dict[str, int]:
        """Exact bytes in use: pages on the host, pages on the device, summaries of the pages on the host."""
        summary_bytes = self.summaries.nbytes // max(1, len(self.summaries))
        n_host = self.host.n_pages - self.host.n_free
        return {"host": self.host.used_bytes, "device": self.device.used_bytes, "summaries": n_host * summary_bytes}

    def attend(self, args: RecallArguments[NDArray[Any]]) -> tuple[Floats, Floats, Ints]:
        """RecallAttention according to its spec. The states that the spec keeps in the pool are kept in working sets."""
        streams = self._streams
        out, lse = np.zeros(args.q.shape, np.float32), np.zeros(args.q.shape[:2], np.float32)
        corrected = np.zeros((args.kv_len.shape[1], args.k.shape[1]), np.int64)
        limits = PageLimits(page_size=args.page_size, sinks=args.sinks, recent=args.recent)
        decoding: list[tuple[int, Ints, int]] = []
        prefetches: list[Prefetch] = []
        try:
            for b in np.flatnonzero(np.diff(args.cu_tokens)):
                rows, n_cached = slice(args.cu_tokens[b], args.cu_tokens[b + 1]), int(args.kv_len[args.layer, b])
                row, last = int(args.query_rows[args.layer, b]), rows.stop - 1
                choice = Choice(
                    limits=limits,
                    budget=budget_tokens(
                        int(args.prompt_len[b]), int(args.adaptive_budget[args.layer, b]), args.kept_share, args.kept_tokens
                    ),
                    tau=args.tau,
                    pooling=args.pooling,
                    softmax_scale=args.softmax_scale,
                    pages=pages_of(args.page_table, args.layer, b, n_cached, args.page_size),
                )
                working_set = self._working_set(row, limits)
                try:
                    if args.prompt_remaining[last] >= 0:
                        out[rows], lse[rows] = streams.read_prompt(
                            working_set,
                            choice,
                            args.q[rows],
                            args.k[rows],
                            args.v[rows],
                            args.summary,
                            scale=args.scale,
                            soft_cap=args.soft_cap,
                        )
                        if args.prompt_remaining[last] == 0:
                            self._first_choices[row] = choice
                            if not self._finds_budgets:
                                streams.recall_ahead(working_set, choice, prefetches)
                    else:
                        corrected[b] = streams.before_attention(
                            args.layer, working_set, choice, args.q[last], args.k[last], args.v[last], args.summary
                        )
                        attended_KT = working_set.attended()
                        n_left_out = len(choice.pages) - attended_KT.shape[1]
                        decoding.append((last, attended_KT, n_cached - n_left_out * args.page_size))
                        streams.recall_ahead(working_set, choice, prefetches)
                except RecallError as error:
                    working_set.failure = error
            if decoding:
                with self._trace.span("attention", layer=args.layer):
                    attend_tables(args.q, decoding, self.device.kv, args.scale, args.soft_cap, out, lse)
        finally:
            for prefetch in prefetches:
                prefetch.attention_done.set()
        return out, lse, corrected

    def find_budget(self, args: BudgetArguments[NDArray[Any]]) -> tuple[Ints]:
        """AdaptiveBudget over the cache on the host, with row 0 (attention of the last query) and ranking 1 (newest first)."""
        budget = args.kv_len[args.layer].copy()
        for b in np.flatnonzero((args.evict == 1) & (np.diff(args.cu_tokens) > 0)):
            n_cached, row = int(args.kv_len[args.layer, b]), int(args.page_table[args.layer, b, 0])
            last = int(args.cu_tokens[b + 1]) - 1
            working_set, choice = self.sets[row], self._first_choices[row]
            try:
                if n_cached > args.sinks + args.recent:
                    self._streams.join(working_set)
                    full = choice.pages[: n_cached // args.page_size]
                    open_page = self.device.kv[[working_set.page_of(n_cached // args.page_size)]]
                    row_HS = last_query_row(
                        args.q[last],
                        args.lse[last],
                        n_cached,
                        full,
                        open_page,
                        self._streams.read_pages,
                        scale=args.scale,
                        soft_cap=args.soft_cap,
                    )
                    slots_KS = np.broadcast_to(np.arange(n_cached), (self.device.kv.shape[2], n_cached))
                    protected_KP = np.concatenate([slots_KS[:, : args.sinks], slots_KS[:, n_cached - args.recent :]], axis=1)
                    candidates_KC = slots_KS[:, args.sinks : n_cached - args.recent][:, ::-1]
                    budget[b] = budget_of_row(row_HS, protected_KP, candidates_KC, args.threshold, args.protected_in_norm)
                prefetches: list[Prefetch] = []
                self._streams.recall_ahead(working_set, dataclasses.replace(choice, budget=int(budget[b])), prefetches)
            except RecallError as error:
                working_set.failure = error
                continue
            for prefetch in prefetches:
                prefetch.attention_done.set()
        return (budget,)

    def fork(self, pages: Ints, twin_pages: Ints) -> None:
        """Copy one layer of a sequence from its host pages ``pages`` to the new host pages ``twin_pages`` of its fork."""
        original = self.sets[int(pages[0])]
        twin = self.sets[int(twin_pages[0])] = WorkingSet(self.device, original.limits)
        self._streams.fork(original, twin, pages, twin_pages)

    def read_pages(self, row: int, pages: Ints) -> Mapping[str, np.ndarray]:
        """See ``CopyableTiers``. Waits for pending copies."""
        self._streams.join(self.sets[row])
        return {"kv": self._streams.read_pages(pages), "summaries": self.summaries[pages]}

    def write_pages(self, pages: Ints, values: Mapping[str, np.ndarray]) -> None:
        """See ``CopyableTiers``. Returns when they have been written."""
        self._streams.write_pages(pages, values["kv"])
        self.summaries[pages] = values["summaries"]

    def read_open_page(self, row: int, page: int, number: int, limits: PageLimits) -> np.ndarray:
        """See ``CopyableTiers``. Waits for pending copies."""
        self._streams.join(self.sets[row])
        copy: np.ndarray = self.device.kv[self.sets[row].page_of(number)].copy()
        return copy

    def begin_at(self, pages: Ints, positions_MP: Ints, limits: PageLimits, *, n_tokens: int) -> None:
        """See ``CopyableTiers``. Sinks and newest pages are read back to the device."""
        working_set = self._working_set(int(pages[0]), limits)
        for first, end in ((0, min(limits.n_sinks, len(pages))), (max(0, len(pages) - limits.n_newest), len(pages))):
            working_set.n_tokens = first * limits.page_size
            working_set.place(self._streams.read_pages(pages[first:end]), n_tokens)

    def _working_set(self, row: int, limits: PageLimits) -> WorkingSet:
        """The working set of a layer of a sequence. A new one is recorded before it allocates, so that ``release`` finds it."""
        if row not in self.sets:
            self.sets[row] = WorkingSet(self.device, limits)
            self.sets[row].open()
        return self.sets[row]

    def warm_up(self) -> None:
        """Compile the functions that are compiled at their first call, other than kernels of ops."""
        nothing = np.empty((self.device.kv.shape[2], 0), np.int64)
        planned_moves(nothing, nothing, nothing, np.arange(0))

    def release(self, rows: Sequence[int]) -> None:
        """Drop layers of sequences: wait for their jobs, failed ones too, and free their device pages."""
        for row in rows:
            working_set = self.sets.get(row)
            self._first_choices.pop(row, None)
            if working_set is not None:
                if working_set.prefetch is not None:
                    working_set.prefetch.attention_done.set()  # an interrupted step may not have set it
                if working_set.lane is not None:
                    self._copies.settle(working_set.lane)
                working_set.release()
                del self.sets[row]

    def close(self) -> None:
        """Release all working sets and close the host tier."""
        self.release(list(self.sets))
        self._copies.close()
        self.host.close()
