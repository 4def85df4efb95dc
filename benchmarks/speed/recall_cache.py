"""Caches on the host without a prefill: random pages in the state that a prompt would have left.

A prefill of 131072 tokens with a model of this size takes hours on two cores, and a step's speed does not depend on the content
of its cache. Only the prompt's attention is skipped; pages, summaries and working sets are as after a prompt, which is checked.
L layers, H query heads, K KV heads, P page size, D head size, M pages.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trt_kv.model_config import ModelConfig
from trt_kv.pipeline.plans import DEFAULT_PAGE_SIZE as PAGE_SIZE
from trt_kv.plugins.kv_rows import dtype_of, head_size_of, store
from trt_kv.plugins.paging import Floats, Rows
from trt_kv.plugins.recall_attention.choice import summaries_of
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.program import PHASES, program_of_model
from trt_kv.runtime.backends.base import Attend, DenseExecutor
from trt_kv.runtime.backends.host.recall.background import Copies
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.layer import staging_slots
from trt_kv.runtime.backends.host.recall.store import HostTier, RamTier
from trt_kv.runtime.backends.host.recall.working_set import WorkingSet
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.backends.step import Ints
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.trace import NO_TRACE, Trace

FREEKV = policy_from_name("freekv")
AT_ONCE = dataclasses.replace(FREEKV, tau=1.01)
"""The same choice of pages, but by each step's own query: every head waits for its pages, as with Quest and ArkVale."""
PAGES_AT_A_TIME = 128


class PoolTier(RamTier):
    """The pages of a KV pool, read in place, so that the whole cache and a recalled one are the same memory."""

    def __init__(self, pool: KvPool[Any]) -> None:
        super().__init__(
            n_pages=pool.n_pages, page_size=pool.page_size, n_kv_heads=pool.kv.shape[2], head_size=pool.kv.shape[4]
        )
        self._kv = pool.kv


class SharedTier(HostTier):
    """The first pages of a tier that several sides read, followed by private pages."""

    def __init__(self, base: HostTier, own: HostTier, *, n_shared: int) -> None:
        _, n_kv_heads, page_size, head_size = base.page_shape
        super().__init__(n_pages=n_shared + own.n_pages, page_size=page_size, n_kv_heads=n_kv_heads, head_size=head_size)
        self._base, self._own, self._n_shared = base, own, n_shared

    def write(self, page: int, kv_2KPD: Rows) -> None:
        assert page >= self._n_shared, "a shared page is never written"
        self._own.write(page - self._n_shared, kv_2KPD)

    def read_head(self, page: int, head: int, into_2PD: Rows) -> None:
        if page < self._n_shared:
            self._base.read_head(page, head, into_2PD)
        else:
            self._own.read_head(page - self._n_shared, head, into_2PD)

    def read_pages(self, pages: Sequence[int]) -> Rows:
        own = [page - self._n_shared for page in pages if page >= self._n_shared]
        shared = [page for page in pages if page < self._n_shared]
        assert list(pages) == [*shared, *(page + self._n_shared for page in own)]
        return (
            np.concatenate([self._base.read_pages(shared), self._own.read_pages(own)]) if own else self._base.read_pages(shared)
        )

    def close(self) -> None:
        self._own.close()


@dataclass(frozen=True, kw_only=True)
class Drift:
    """Random walk of a layer's queries from token to token, in place of a random model's queries, whose drift is arbitrary.

    With probability ``events`` some of the layer's KV heads jump, each with probability ``heads``, to an independent query. The
    others have a cosine of ``cosine`` with the previous query.
    """

    name: str
    events: float
    heads: float
    cosine: float = 0.97

    def queries(self, config: ModelConfig, n_steps: int, *, seed: int = 0) -> Floats:
        """[n_steps, L, H, D] fp32; the first is that of the prompt's last token."""
        rng = np.random.default_rng(seed)
        shape = (config.n_layers, config.n_heads, config.head_dim)
        group = config.n_heads // config.n_kv_heads
        queries = np.empty((n_steps, *shape), np.float32)
        queries[0] = rng.standard_normal(shape, np.float32)
        for step in range(1, n_steps):
            fresh = rng.standard_normal(shape, np.float32)
            event_LK = rng.random((config.n_layers, 1)) < self.events
            leaves_LK = event_LK & (rng.random((config.n_layers, config.n_kv_heads)) < self.heads)
            stays_LHD = self.cosine * queries[step - 1] + np.float32(np.sqrt(1 - self.cosine**2)) * fresh
            queries[step] = np.where(np.repeat(leaves_LK, group, axis=1)[..., None], fresh, stays_LHD)
        return queries


CALM = Drift(name="none", events=0.0, heads=0.0)
AS_AT_08 = Drift(name="as measured at tau 0.8", events=0.40, heads=0.35)
AS_AT_09 = Drift(name="as measured at tau 0.9", events=0.90, heads=0.67)
"""Correction rates of R1-Llama-8B on reasoning: any head 0.40 and 0.90, each head 0.14 and 0.60 (third-party measurement)."""


class WithQueries:
    """A dense executor whose queries are replaced after they are computed, the same for all sides. See ``Drift``."""

    def __init__(self, executor: DenseExecutor, queries: Floats, *, first: int, trace: Trace = NO_TRACE) -> None:
        """``queries`` [n_steps, L, H, D]; the second one belongs to the token at position ``first``."""
        self._executor, self._queries, self._first, self._trace = executor, queries, first, trace

    @property
    def description(self) -> str:
        return self._executor.description

    def run(self, input_ids: Ints, positions: Ints, logit_rows: Ints, attend: Attend) -> Floats:
        """See ``DenseExecutor.run``; steps of one token."""
        queries_LHD = self._queries[int(positions[0]) - self._first + 1]

        def attend_with(layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
            assert q.shape[1:] == queries_LHD[layer].shape
            with self._trace.span("cache", layer=layer):
                return attend(layer, queries_LHD[layer][None], k, v)

        return self._executor.run(input_ids, positions, logit_rows, attend_with)


@dataclass(frozen=True, kw_only=True)
class RecallSide:
    """A sequence whose cache is on the host, and the runner that continues it."""

    runner: ModelRunner
    sequence: SequenceCache
    recall: StreamedRecall
    copies: Copies

    def decode(self, n_steps: int = 1) -> Floats:
        """Run steps, which also extend the context; returns the last logits [V]."""
        logits_V: Floats = np.empty(0, np.float32)
        for _ in range(n_steps):
            logits_V = self.runner.decode([self.sequence], [5])[0]
        return logits_V

    def turn(self, n_steps: int) -> None:
        """Run steps and wait for their copies, so that the time of a side includes all of its work and no other's."""
        self.decode(n_steps)
        self.settle()

    def settle(self) -> None:
        """Wait for all copies."""
        for working_set in self.recall.sets.values():
            if working_set.lane is not None:
                self.copies.settle(working_set.lane)

    def close(self) -> None:
        self.sequence.release()
        self.recall.close()


def fill_pages(host: HostTier, summaries: Rows, n_pages: int, *, seed: int = 0) -> None:
    """Random keys and values in the first pages of a tier, and their summaries [M, K, 2, W]."""
    rng = np.random.default_rng(seed)
    shape = *host.page_shape[:-1], head_size_of(summaries)
    for first in range(0, n_pages, PAGES_AT_A_TIME):
        kv_M2KPD = rng.standard_normal((min(PAGES_AT_A_TIME, n_pages - first), *shape), np.float32)
        kv_M2KPW = store(kv_M2KPD, host.dtype)
        for page, kv_2KPW in enumerate(kv_M2KPW, start=first):
            host.write(page, kv_2KPW)
        summaries[first : first + len(kv_M2KPW)] = summaries_of(kv_M2KPW[:, 0], 0, dtype_of(summaries))


def device_pages(policy: Policy, n_layers: int) -> int:
    """Pages of one sequence's working sets, which an engine reserves for a request."""
    limits = limits_of(policy)
    n_chosen = limits.n_chosen(policy.tokens)
    return n_layers * (limits.n_sinks + limits.n_newest + n_chosen + staging_slots(n_chosen))


def limits_of(policy: Policy, page_size: int = PAGE_SIZE) -> PageLimits:
    """Sinks and newest in pages."""
    return PageLimits(page_size=page_size, sinks=policy.sinks, recent=policy.recent)


def recall_side(
    executor: DenseExecutor,
    config: ModelConfig,
    host: HostTier,
    copies: Copies,
    *,
    n_tokens: int = 0,
    queries_LHD: Floats | None = None,
    policy: Policy = FREEKV,
    summaries: Rows | None = None,
    trace: Trace = NO_TRACE,
) -> RecallSide:
    """A sequence of ``n_tokens`` whose pages are already on ``host``, as its first ones, layer after layer.

    ``queries_LHD``: of the prompt's last token; None: nothing has been prefilled. ``summaries``: of the pages on the host;
    None: allocated here.
    """
    device = HostKvPool(
        n_pages=device_pages(policy, config.n_layers),
        page_size=PAGE_SIZE,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
    )
    recall = StreamedRecall(host, device, copies, n_layers=config.n_layers, finds_budgets=False, trace=trace)
    if summaries is not None:
        recall.summaries = summaries
    programs = {phase: program_of_model(config, policy, phase=phase, page_size=PAGE_SIZE) for phase in PHASES}
    runner = host_runner(executor, device, programs, recall=recall, trace=trace)
    sequence = runner.new_sequence()
    if queries_LHD is not None:
        place_prompt(recall, sequence, limits_of(policy), n_tokens, queries_LHD)
    return RecallSide(runner=runner, sequence=sequence, recall=recall, copies=copies)


def place_prompt(
    recall: StreamedRecall, sequence: SequenceCache, limits: PageLimits, n_tokens: int, queries_LHD: Floats
) -> None:
    """Create what a prompt leaves on the device: sinks, newest pages, last query. The first step recalls at once."""
    sequence.append(n_tokens)
    sequence.n_prompt = n_tokens
    n_pages, rest = divmod(n_tokens, limits.page_size)
    assert rest == 0, "an open page is not on the host"
    for layer in range(sequence.n_layers):
        pages = sequence.page_table[layer, :n_pages]
        working_set = WorkingSet(recall.device, limits)
        working_set.open()
        for first, end in ((0, limits.n_sinks), (n_pages - limits.n_newest, n_pages)):
            working_set.n_tokens = first * limits.page_size
            working_set.place(recall.host.read_pages([int(page) for page in pages[first:end]]), end * limits.page_size)
        working_set.query_HD = queries_LHD[layer].copy()
        recall.sets[int(pages[0])] = working_set
