"""Caches of an engine that no prompt was read for: random pages in the state that a prompt would have left.

Reading 131,072 tokens takes an hour and more on two cores, and the time of a step does not depend on the content of its cache,
except for what recall moves; there the model's queries are replaced by ones that drift as measured (``recall_cache``).
"""

from typing import Any

import numpy as np

from benchmarks.peers.protocol import Answer, Job
from benchmarks.peers.serving import CannotDoError, Clock
from benchmarks.speed.recall_cache import AS_AT_08, WithQueries, fill_pages, limits_of, place_prompt
from trt_kv.plugins.kv_rows import dtype_of, head_size_of, store
from trt_kv.plugins.paging import Floats
from trt_kv.plugins.recall_attention.choice import summaries_of
from trt_kv.program import finds_budgets
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.in_place import RecallInPlace
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.engine import Engine

WARM_UP_STEPS = 3
PAGES_AT_A_TIME = 256


def read_bytes(engine: Engine, sequence: SequenceCache) -> int:
    """Bytes of keys, values and summaries that the sequence's next step reads."""
    row_bytes = engine.runner.pool.kv[0, 0, 0, 0].nbytes
    held, policy, tiers = sequence.held_tokens, engine.manifest.applied_policy, engine.runner.tiers
    if policy.recalls and policy.budget == "constant":
        limits = limits_of(policy, engine.manifest.page_size)
        n_pages = limits.n_sinks + limits.n_newest + limits.n_chosen(policy.tokens)
        held = np.minimum(held, n_pages * engine.manifest.page_size)
    n_bytes = int(held.sum()) * engine.manifest.config.n_kv_heads * 2 * int(row_bytes)
    return n_bytes + (tiers.used_bytes["summaries"] if isinstance(tiers, StreamedRecall | RecallInPlace) else 0)


class PlacedCaches:
    """Decodes after prompts that were not read."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._is_filled = False

    def decode(self, job: Job) -> Answer:
        """``job.n_tokens`` steps after ``job.context`` tokens, a multiple of the page size.

        ``CannotDoError`` for a policy whose budgets follow from the prompt.
        """
        engine, runner = self._engine, self._engine.runner
        if finds_budgets(engine.manifest.programs["prefill"]):
            raise CannotDoError("how much the policy keeps follows from a prompt, which a synthetic cache has not")
        self._fill()
        sequence = runner.new_sequence()
        executor = runner._executor
        assert isinstance(executor, SplitStepExecutor)
        dense = executor.dense
        token = engine.manifest.config.vocab_size // 2
        try:
            if runner.tiers is not None:
                n_steps = WARM_UP_STEPS + job.n_tokens + 3
                queries = AS_AT_08.queries(engine.manifest.config, n_steps, seed=job.seed)
                executor.dense = WithQueries(dense, queries, first=job.context)
                self._place_recalled(sequence, job.context, queries[0])
            else:
                self._place(sequence, job.context)
            for _ in range(WARM_UP_STEPS):
                runner.decode([sequence], [token])
            clock = Clock()
            clock.token()
            for _ in range(job.n_tokens):
                runner.decode([sequence], [token])[0].argmax()
                clock.token()
            return clock.answer(is_synthetic=True, kv_bytes=read_bytes(engine, sequence))
        finally:
            executor.dense = dense
            sequence.release()

    def _fill(self) -> None:
        """Random numbers in every page, once."""
        if self._is_filled:
            return
        runner = self._engine.runner
        if isinstance(runner.tiers, StreamedRecall):
            fill_pages(runner.tiers.host, runner.tiers.summaries, runner.tiers.host.n_pages)
        elif isinstance(runner.tiers, RecallInPlace):
            _fill_pool(runner.tiers.host)
            summaries, keys = runner.tiers.summaries, runner.tiers.host.kv[:, 0]
            for first in range(0, len(keys), PAGES_AT_A_TIME):
                part = slice(first, first + PAGES_AT_A_TIME)
                summaries[part] = summaries_of(keys[part], 0, dtype_of(summaries))
        else:
            _fill_pool(runner.pool)
        self._is_filled = True

    def _place_recalled(self, sequence: SequenceCache, n_tokens: int, query_LHD: Floats) -> None:
        """What a prompt leaves on the host, whose last query was ``query_LHD``."""
        manifest, tiers = self._engine.manifest, self._engine.runner.tiers
        if isinstance(tiers, StreamedRecall):
            place_prompt(tiers, sequence, limits_of(manifest.applied_policy, manifest.page_size), n_tokens, query_LHD)
            return
        assert isinstance(tiers, RecallInPlace)
        sequence.append(n_tokens)
        sequence.n_prompt = n_tokens
        tiers.last_query[sequence.page_table[:, 0]] = query_LHD

    def _place(self, sequence: SequenceCache, n_tokens: int) -> None:
        """What a prompt leaves, with the first tokens in place of the best ones."""
        manifest = self._engine.manifest
        sequence.append(n_tokens)
        sequence.n_prompt = n_tokens
        budgets = [budget for budget in manifest.budgets if budget is not None]
        kept = [budget.of(n_tokens) for budget in budgets]
        if any(n < n_tokens for n in kept):
            shares = [n / n_tokens for n in kept]
            sequence.shrink(np.array(kept), shares if manifest.applied_policy.decode == "row" else None)


def _fill_pool(pool: Any) -> None:
    """One block of random pages, over and over: every step reads what it reads from memory, not from a cache."""
    n_pages, _, n_heads, page_size, _ = pool.kv.shape
    dtype = dtype_of(pool.kv)
    rng = np.random.default_rng(0)
    shape = (PAGES_AT_A_TIME, 2, n_heads, page_size, head_size_of(pool.kv))
    block = store(rng.standard_normal(shape, np.float32), dtype)
    for first in range(0, n_pages, PAGES_AT_A_TIME):
        n = min(PAGES_AT_A_TIME, n_pages - first)
        pool.kv[first : first + n] = block[:n]
    pool.token_positions[:] = np.arange(page_size)
    pool.scores[:] = rng.standard_normal(pool.scores[:1].shape, np.float32)
