"""Caches of an engine that no prompt was read for: random pages in the state that a prompt would have left.

Reading 131,072 tokens takes an hour and more on two cores, and the time of a step does not depend on the content of its cache,
except for what recall moves; there the model's queries are replaced by ones that drift as measured (``recall_cache``).
L layers, H query heads, K KV heads, P page size, D head size, M pages, W elements of a stored row.
"""

import dataclasses

import numpy as np

from benchmarks.peers.protocol import Answer, Job
from benchmarks.peers.runners.our_requests import answer_of, submitted
from benchmarks.peers.serving import CannotDoError
from benchmarks.speed.recall_cache import AS_AT_08, WithQueries, limits_of, place_prompt
from trt_kv.plugins.kv_rows import dtype_of, head_size_of, load, store
from trt_kv.plugins.paging import Floats, Ints, Rows
from trt_kv.plugins.recall_attention.choice import summaries_of
from trt_kv.program import finds_budgets
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.in_place import RecallInPlace
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.engine import Engine

SHORT_PROMPT = 32
"""Tokens that a request really reads before its cache is replaced by a long one."""
WARM_UP_STEPS = 3
PAGES_AT_A_TIME = 64
"""Of the block of random pages: small beside what is measured."""


class PlacedCaches:
    """Decodes after prompts that were not read."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._filled: set[int] = set()
        """Pages that have random numbers already."""

    def decode(self, job: Job) -> Answer:
        """``job.n_tokens`` tokens after ``job.context`` ones, a multiple of the page size, by the engine's own loop: a request
        that has read a short prompt goes on with a sequence of that length.

        ``CannotDoError`` for a policy whose budgets follow from the prompt.
        """
        engine, runner = self._engine, self._engine.runner
        if finds_budgets(engine.manifest.programs["prefill"]):
            raise CannotDoError("how much the policy keeps follows from a prompt, which a synthetic cache has not")
        executor = runner._executor
        assert isinstance(executor, SplitStepExecutor)
        dense = executor.dense
        request = submitted(engine, [engine.manifest.config.vocab_size // 2] * SHORT_PROMPT, WARM_UP_STEPS + job.n_tokens)
        engine.core.wait(lambda: bool(request.times.tokens) or request.is_finished)
        if request.error is not None:
            raise request.error
        try:
            request.sequence.release()
            request.held_sequence = sequence = runner.new_sequence()
            if runner.tiers is not None:
                queries = AS_AT_08.queries(engine.manifest.config, WARM_UP_STEPS + job.n_tokens + 3, seed=job.seed)
                executor.dense = WithQueries(dense, queries, first=job.context)
                self._place_recalled(sequence, job.context, queries[0])
            else:
                self._place(sequence, job.context)
            answer = answer_of(engine, request, job.n_tokens, skip=WARM_UP_STEPS)
            return dataclasses.replace(answer, first_token_s=None)
        finally:
            executor.dense = dense

    def _place_recalled(self, sequence: SequenceCache, n_tokens: int, query_LHD: Floats) -> None:
        """What a prompt leaves on the host, whose last query was ``query_LHD``."""
        manifest, tiers = self._engine.manifest, self._engine.runner.tiers
        if isinstance(tiers, StreamedRecall):
            # A sequence is given the lowest pages that are free, and here all are.
            pages = self._new_pages(np.arange(manifest.config.n_layers * -(-n_tokens // manifest.page_size)))
            block_M2KPW = _random_pages(self._engine.runner.pool)
            for page in pages:
                tiers.host.write(int(page), block_M2KPW[page % len(block_M2KPW)])
            _fill_summaries(tiers.summaries, pages, block_M2KPW)
            place_prompt(tiers, sequence, limits_of(manifest.applied_policy, manifest.page_size), n_tokens, query_LHD)
            return
        assert isinstance(tiers, RecallInPlace)
        sequence.append(n_tokens)
        sequence.n_prompt = n_tokens
        pages = self._new_pages(_pages_of(sequence))
        _fill_summaries(tiers.summaries, pages, _fill_pool(tiers.host, pages))
        tiers.last_query[sequence.page_table[:, 0]] = query_LHD

    def _new_pages(self, pages_M: Ints) -> Ints:
        """Those of the pages that have not been filled yet, which they will be."""
        new = [int(page) for page in pages_M if int(page) not in self._filled]
        self._filled.update(new)
        return np.array(new, np.int64)

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
        _fill_pool(self._engine.runner.pool, self._new_pages(_pages_of(sequence)))


def _pages_of(sequence: SequenceCache) -> Ints:
    """The pages of all layers."""
    counts = -(-sequence.kv_len // sequence.pool.page_size)
    return np.concatenate([pages[:count] for pages, count in zip(sequence.page_table, counts, strict=True)])


def _random_pages(pool: KvPool[np.ndarray]) -> Rows:
    """A block of random pages [M, 2, K, P, W], stored as those of ``pool``."""
    _, _, n_heads, page_size, _ = pool.kv.shape
    shape = (PAGES_AT_A_TIME, 2, n_heads, page_size, head_size_of(pool.kv))
    block_M2KPW: Rows = store(np.random.default_rng(0).standard_normal(shape, np.float32), dtype_of(pool.kv))
    return block_M2KPW


def _fill_pool(pool: KvPool[np.ndarray], pages_M: Ints) -> Rows:
    """One block of random pages, over and over: every step reads what it reads from memory, not from a cache. Returns it."""
    block_M2KPW = _random_pages(pool)
    for first in range(0, len(pages_M), PAGES_AT_A_TIME):
        part_M = pages_M[first : first + PAGES_AT_A_TIME]
        pool.kv[part_M] = block_M2KPW[: len(part_M)]
    pool.token_positions[pages_M] = np.arange(pool.page_size)
    pool.scores[pages_M] = np.random.default_rng(0).standard_normal(pool.scores[:1].shape, np.float32)
    return block_M2KPW


def _fill_summaries(summaries_MK2W: Rows, pages_M: Ints, block_M2KPW: Rows) -> None:
    """Summaries with the mean and spread of those of the block, but no two alike: equal pages would be chosen together."""
    dtype, rng = dtype_of(block_M2KPW), np.random.default_rng(1)
    of_block_MK2D = load(summaries_of(block_M2KPW[:, 0], 0, dtype))
    middle_2D, spread_2D = of_block_MK2D.mean(axis=(0, 1)), of_block_MK2D.std(axis=(0, 1))
    for first in range(0, len(pages_M), PAGES_AT_A_TIME):
        part_M = pages_M[first : first + PAGES_AT_A_TIME]
        noise_MK2D = rng.standard_normal((len(part_M), *of_block_MK2D.shape[1:]), np.float32)
        summaries_MK2W[part_M] = store(middle_2D + spread_2D * noise_MK2D, dtype)
