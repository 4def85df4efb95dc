"""Token ids to logits: chunked prefill, batched decode, and eviction according to the program."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trt_kv.errors import UsageError
from trt_kv.plugins.paging import Floats, gather_slots, pages_of
from trt_kv.program import Program, budgets_of, eviction_nodes, finds_budgets, recalling_layers, windows_of
from trt_kv.runtime.backends.base import ChoosingExecutor, StepExecutor
from trt_kv.runtime.backends.step import Choice, Chosen, Ints, Step, StepResult
from trt_kv.runtime.cache.blocks import CacheBlocks
from trt_kv.runtime.cache.draws import Draws
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.cache.states import SequenceStates
from trt_kv.runtime.cache.tiered_sequence import CopyableTiers, TieredSequence
from trt_kv.runtime.request import Request
from trt_kv.runtime.scheduler import StepPlan
from trt_kv.runtime.trace import NO_TRACE, Trace

NOT_PROMPT = -1
DROP_ONE = 2
DEFAULT_CHUNK = 512


class ModelRunner:
    """One model on one executor of steps, with one KV pool.

    ``programs`` holds the KV ops of the phases "prefill" and "decode"; ``decode`` is the policy's. Prefill runs one sequence at
    a time, so that a sequence's chunks, and with them its rounding, do not depend on other requests.
    """

    def __init__(
        self,
        executor: StepExecutor,
        pool: KvPool[Any],
        programs: Mapping[str, Program],
        *,
        chunk: int = DEFAULT_CHUNK,
        decode: str = "row",
        decode_distance: int = 25,
        reading_reserve: int | None = None,
        draws: Draws | None = None,
        tiers: CopyableTiers | None = None,
        trace: Trace = NO_TRACE,
    ) -> None:
        """``reading_reserve``: tokens that a layer holds beyond its budget between two chunks of a prompt; None: all of it.

        ``draws``: how pages of generated tokens are drawn; None: none are.

        ``tiers``: a cache on the host, with ``pool`` as the device, whose kernels ``executor`` has been given. None: every
        layer's cache is in ``pool``.
        """
        self.pool = pool
        self.tiers = tiers
        self._trace = trace
        self.chunk = chunk
        self._executor = executor
        self._host_layers = recalling_layers(programs["decode"])
        self._decode = decode
        self._decode_distance = decode_distance
        self._reading_reserve = reading_reserve
        self._draws = draws
        self._budgets = budgets_of(programs["prefill"])
        self._windows = windows_of(programs["decode"])
        evictions = [node for node in eviction_nodes(programs["prefill"]) if node is not None]
        self._evicts = bool(evictions)
        self._floor = max((int(node.attributes.get("floor", 0)) for node in evictions), default=0)
        self.blocks = CacheBlocks(pool, tiers, programs["prefill"])
        """Copies of what sequences have cached."""
        self.states = SequenceStates(pool, tiers, programs["prefill"])
        """The same of all that they hold, between the turns of a conversation."""
        self._ends_prompts = self._evicts or finds_budgets(programs["prefill"])

    @property
    def description(self) -> str:
        """What runs the steps, for reports: library, version, device."""
        return self._executor.description

    def close(self) -> None:
        """Stop background work and free a cache on the host, if there is any. Nothing runs afterwards."""
        if self.tiers is not None:
            self.tiers.close()

    def warm_up(self) -> None:
        """Compile kernels before their first call (seconds on a fresh installation, milliseconds afterwards)."""
        self._executor.warm_up()
        if self.tiers is not None:
            self.tiers.warm_up()

    def new_sequence(self) -> SequenceCache:
        if self.tiers is not None:
            return TieredSequence(self.tiers, n_layers=len(self._budgets), host_layers=self._host_layers, windows=self._windows)
        return SequenceCache(
            self.pool,
            n_layers=len(self._budgets),
            decode_distance=self._decode_distance,
            floor=self._floor,
            windows=self._windows,
        )

    def run(self, plan: StepPlan[Request]) -> Floats:
        """Run one step of a schedule: logits [R, V], a row for each request. After a chunk that is not its prompt's last, they
        have no meaning.

        A sequence that fails (``RecallError``) does not stop the others: its ``failure`` is the error, and its logits have no
        meaning. On ``CapacityError`` no sequence has advanced; after any other error all sequences of the step are unusable.
        """
        sequences = [request.sequence for request in plan.requests]
        if plan.phase == "decode":
            return self._decode_step(sequences, [request.token_ids[-1] for request in plan.requests])
        (request,) = plan.requests
        chunk = np.asarray(request.prompt_ids[plan.start : plan.end], np.int64)
        rows = np.array([len(chunk) - 1])
        return self._read_chunk(sequences[0], chunk, request.size.n_prompt - plan.end, rows, evict=True)

    @property
    def chooses(self) -> bool:
        """Whether tokens can be chosen where the logits are: ``run_choosing``."""
        return isinstance(self._executor, ChoosingExecutor)

    def run_choosing(self, plan: StepPlan[Request], choices: Sequence[Choice]) -> tuple[Chosen, ...]:
        """Run a decode step and choose the tokens of its requests by ``choices``. Errors and failures as for ``run``."""
        sequences = [request.sequence for request in plan.requests]
        chosen = self._decoded(sequences, [request.token_ids[-1] for request in plan.requests], choices).chosen
        assert chosen is not None
        return chosen

    def prefill(
        self,
        sequence: SequenceCache,
        token_ids: Sequence[int],
        *,
        evict: bool = True,
        all_logits: bool = False,
    ) -> Floats:
        """Prefill a whole prompt chunk by chunk, evicting with its last chunk.

        Returns the last token's logits [V], or every token's [N, V] with ``all_logits``. Memory: O(N * chunk). Raises
        ``CapacityError`` when the pool is full; the sequence keeps what it had and must be released by its owner.
        """
        ids = np.asarray(token_ids, np.int64)
        logits = []
        for start in range(0, len(ids), self.chunk):
            chunk = ids[start : start + self.chunk]
            n_left = len(ids) - start - len(chunk)
            rows = np.arange(len(chunk)) if all_logits else np.array([len(chunk) - 1])
            logits.append(self._read_chunk(sequence, chunk, n_left, rows, evict=evict))
            if sequence.failure is not None:
                raise sequence.failure
        return np.concatenate(logits) if all_logits else logits[-1][0]

    def decode(self, sequences: Sequence[SequenceCache], token_ids: Sequence[int]) -> Floats:
        """One decode step of B sequences; returns the next tokens' logits [B, V]. ``RecallError`` if a sequence is lost."""
        logits_BV = self._decode_step(sequences, token_ids)
        for sequence in sequences:
            if sequence.failure is not None:
                raise sequence.failure
        return logits_BV

    def _read_chunk(self, sequence: SequenceCache, chunk: Ints, n_left: int, rows: Ints, *, evict: bool) -> Floats:
        """Prefill N tokens of a prompt, which ``n_left`` more follow; logits [R, V] of ``rows``.

        With a ``reading_reserve`` each chunk is scored and evicted from like a prompt of its own, but with the budget of the
        whole prompt and the reserve.
        """
        reserve = self._reading_reserve if evict and self._evicts and n_left else None
        if sequence.is_evicted:
            self.states.go_on(sequence)
        ends = n_left == 0 or reserve is not None
        remaining = (0 if ends else n_left) + len(chunk) - 1 - np.arange(len(chunk))
        flags = np.array([int(ends and evict and self._ends_prompts)])
        n_seen = sequence.num_computed_tokens + len(chunk)
        goes_on = sequence.goes_on or sequence.is_evicted or reserve is not None
        budget = self._budget_of(n_seen + n_left) + (reserve or 0) if flags[0] and goes_on else None
        result = self._step("prefill", [sequence], [chunk], rows, remaining, flags, budget=budget)
        if flags[0] and self._evicts and sequence.failure is None:
            kept_L = result.kept[:, 0]
            shares = None if n_left else self._growth((kept_L / sequence.num_computed_tokens).tolist())
            sequence.shrink(kept_L, shares)
        sequence.free_passed()
        if self._draws is not None:
            sequence.protect()
        return result.logits

    def _budget_of(self, n_seen: int) -> Ints:
        """[L, 1]: tokens that each layer keeps of all that a conversation has seen; all of them where a step finds out."""
        return np.array([[n_seen if budget is None else budget.of(n_seen)] for budget in self._budgets])

    def _decode_step(self, sequences: Sequence[SequenceCache], token_ids: Sequence[int]) -> Floats:
        return self._decoded(sequences, token_ids, None).logits

    def _decoded(
        self, sequences: Sequence[SequenceCache], token_ids: Sequence[int], choices: Sequence[Choice] | None
    ) -> StepResult:
        ids = [np.array([token_id], np.int64) for token_id in token_ids]
        remaining = np.full(len(ids), NOT_PROMPT)
        flags = np.array([DROP_ONE * (self._decode == "rank" and sequence.is_evicted) for sequence in sequences])
        result = self._step("decode", sequences, ids, np.arange(len(ids)), remaining, flags, choices)
        for b, sequence in enumerate(sequences):
            if flags[b]:
                sequence.settle(result.kept[:, b])
            sequence.free_passed()
            if self._draws is not None and sequence.failure is None:
                sequence.draw(self._draws)
        return result

    def scores(self, sequence: SequenceCache) -> Floats:
        """The scores of the cached tokens of each of the L layers without a window, which must hold the same number of tokens:
        [L, K, S] fp32.
        """
        return np.stack([self._of_slots(self.pool.scores, sequence, layer) for layer in self.whole_layers])

    @property
    def whole_layers(self) -> list[int]:
        """The layers without an attention window."""
        return [layer for layer, window in enumerate(self._windows) if not window]

    def importance(self, token_ids: Sequence[int]) -> Floats:
        """Scores of each token of a prompt by the program, without eviction: [L, K, N] fp32, L as for ``scores``."""
        sequence = self.new_sequence()
        try:
            self.prefill(sequence, token_ids, evict=False)
            return self.scores(sequence)
        finally:
            sequence.release()

    def kept_positions(self, sequence: SequenceCache, layer: int) -> Ints:
        """True absolute positions of the tokens cached by each KV head of ``layer``, in slot order: [K, S] int64."""
        return self._of_slots(self.pool.token_positions, sequence, layer)

    def _require_host_pool(self, what: str) -> None:
        if not self.pool.on_host:
            raise UsageError(
                f"{what} need a KV pool on the host",
                got=self._executor.description,
                fix="build for --target onnxruntime, and load it on the device cpu",
            )

    def _growth(self, kept_shares: Sequence[float]) -> list[float] | None:
        """Share at which each layer grows while decoding: that of its budget if it is a share, else the share it kept."""
        if self._decode != "row":
            return None
        return [
            found if budget is None or budget.tokens else budget.share
            for found, budget in zip(kept_shares, self._budgets, strict=True)
        ]

    def _of_slots(self, pool_MKP: np.ndarray, sequence: SequenceCache, layer: int) -> np.ndarray:
        self._require_host_pool("scores and kept positions")
        n_cached = int(sequence.kv_len[layer])
        pages = pages_of(sequence.page_table[:, None], layer, 0, n_cached, self.pool.page_size)
        return gather_slots(pool_MKP, pages, n_cached)

    def _step(
        self,
        phase: str,
        sequences: Sequence[SequenceCache],
        ids: Sequence[Ints],
        logit_rows: Ints,
        prompt_remaining: Ints,
        evict: Ints,
        choices: Sequence[Choice] | None = None,
        budget: Ints | None = None,
    ) -> StepResult:
        """Run one step and store its adaptive budgets in the sequences. ``CapacityError`` before any sequence has advanced."""
        for sequence, new in zip(sequences, ids, strict=True):
            sequence.make_room(len(new))
        firsts = [sequence.num_computed_tokens for sequence in sequences]
        slots = np.concatenate([s.append(len(i)) for s, i in zip(sequences, ids, strict=True)], axis=1)
        if phase == "prefill":
            for sequence in sequences:
                sequence.n_prompt = sequence.num_computed_tokens
        page_table = _stacked_page_tables(sequences)
        step = Step(
            input_ids=np.concatenate(ids),
            positions=np.concatenate([np.arange(first, first + len(i)) for first, i in zip(firsts, ids, strict=True)]),
            logit_rows=logit_rows,
            cu_tokens=np.cumsum([0, *(len(i) for i in ids)]),
            slots=slots,
            page_table=page_table,
            kv_len=np.stack([s.kv_len for s in sequences], axis=1),
            prompt_remaining=prompt_remaining,
            evict=evict,
            prompt_len=np.array([s.n_prompt for s in sequences]),
            adaptive_budget=np.stack([s.adaptive_budget for s in sequences], axis=1),
            query_rows=page_table[:, :, 0],
            budget=budget,
        )
        with self._trace.span(f"{phase} step", tokens=len(step.input_ids)):
            if choices is None:
                result = self._executor.run_step(phase, step, self.pool)
            else:
                assert isinstance(self._executor, ChoosingExecutor)
                result = self._executor.run_step_choosing(step, self.pool, choices)
        for b, sequence in enumerate(sequences):
            if evict[b] == 1 and result.adaptive_budget is not None:
                sequence.adaptive_budget = result.adaptive_budget[:, b].copy()
        return result


def _stacked_page_tables(sequences: Sequence[SequenceCache]) -> Ints:
    """The sequences' page tables side by side: [L, B, T], -1 beyond a sequence's own width."""
    width = max(sequence.page_table.shape[1] for sequence in sequences)
    stacked = np.full((sequences[0].n_layers, len(sequences), width), -1)
    for b, sequence in enumerate(sequences):
        stacked[:, b, : sequence.page_table.shape[1]] = sequence.page_table
    return stacked
