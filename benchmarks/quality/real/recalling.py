"""The same for policies whose cache stays on the host: what a step attends to, and what it moves; see ``quality.recall``."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.harness import Floats, Plan, released
from benchmarks.quality.recall.harness import RecallHarness
from benchmarks.quality.recall.policies import small
from benchmarks.quality.recall.steps import Movement
from benchmarks.quality.steps import LastQuery
from trt_kv.policies import policy_from_name
from trt_kv.program import PAGE_SUMMARIES
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.sequence import SequenceCache


class Recaller:
    """One model on one executor and one pool that has what RecallAttention stores."""

    def __init__(self, dense: DenseExecutor, pool: KvPool[Any], *, n_layers: int, scale: float) -> None:
        self.pool = pool
        self.harness = RecallHarness(dense, pool, small(policy_from_name("freekv")), n_layers=n_layers, scale=scale)
        self._n_layers = n_layers

    @contextmanager
    def forks(self, whole: SequenceCache, queries: Sequence[LastQuery], plans: Sequence[Plan]) -> "Iterator[Forks]":
        """A fork of the prompt ``whole`` for each plan. ``queries``: of its last token, per layer.

        ``whole`` was read by any runner on the pool, since all these policies read a prompt with full attention.
        """
        with released() as sequences:
            for plan in plans:
                sequences.append(self._fork(whole, queries, plan))
            movements = [Movement(self._n_layers, self.pool.kv.shape[2]) for _ in plans]
            yield Forks(recaller=self, sequences=sequences, plans=plans, movements=movements)

    def _fork(self, whole: SequenceCache, queries: Sequence[LastQuery], plan: Plan) -> SequenceCache:
        """A fork with what RecallAttention would have stored: summaries of full pages, and the last query."""
        fork = whole.fork()
        fork.adaptive_budget[:] = -1
        summary = PAGE_SUMMARIES[plan.policy.page_summary]
        n_full = fork.num_computed_tokens // self.pool.page_size
        for layer, query in enumerate(queries):
            pages = fork.page_table[layer]
            full = pages[:n_full]
            self.harness.steps.summarise(self.pool, full, summary)
            self.pool.last_query[pages[0]] = query.q[0]
        return fork


@dataclass(frozen=True, kw_only=True)
class Forks:
    """Sequences of one prompt under several plans, and the pages that each has moved."""

    recaller: Recaller
    sequences: Sequence[SequenceCache]
    plans: Sequence[Plan]
    movements: Sequence[Movement]

    def decode(self, members: Sequence[int], fed: list[int]) -> Floats:
        """One decode step of some of them."""
        harness = self.recaller.harness
        harness.steps.programs = [harness.program(self.plans[i], "decode") for i in members]
        harness.steps.movements = [self.movements[i] for i in members]
        return harness.runner.decode([self.sequences[i] for i in members], fed)

    def attended_shares(self) -> list[float]:
        """Tokens that a step attended to, as shares of all that there were; mean over layers and steps."""
        n_seen = [sequence.num_computed_tokens for sequence in self.sequences]
        return [
            float(of.attended_L.mean()) / (max(1, of.n_steps) * n) if of.n_steps else 1.0
            for of, n in zip(self.movements, n_seen, strict=True)
        ]

    def moved_bytes(self) -> list[int]:
        """Bytes of the pages that were copied from the host."""
        return [(of.ahead + of.late) * self.recaller.harness.page_head_bytes for of in self.movements]
