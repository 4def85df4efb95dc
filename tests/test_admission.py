"""Whoever has been admitted never lacks a page: what is reserved covers the worst that a policy allows, and hardly more."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving import CHUNK, assert_idle, engine_under, prompts_of, small_policy, streamed
from trt_kv.errors import CapacityError
from trt_kv.layer_budget import ALL, LayerBudget
from trt_kv.plugins.paging import Floats, Ints
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.runtime.backends.host.recall.layer import staging_slots
from trt_kv.runtime.backends.host.recall.store import RamTier
from trt_kv.runtime.backends.host.recall.working_set import WorkingSet
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.cache.tiered_sequence import TieredSequence
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.reservation import CachePages, HostPages, Places, RequestSize, Reservation, Resource, WorkingSetPages
from trt_kv.runtime.scheduler import Scheduler, StepPlan

PAGE_SIZE = 4
QUICK = ("full", "prefixkv_paper", "refreekv", "h2o", "freekv")
POLICIES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in policy_names()]

budgets = st.none() | st.builds(LayerBudget, share=st.floats(0.0, 1.0), tokens=st.integers(-9, 20))
many_budgets = st.lists(budgets, min_size=1, max_size=4)
windows_of_layers = st.lists(st.sampled_from([0, 0, 1, 4, 13]), min_size=4, max_size=4)
"""Of the first layers of a model: 0, no window."""
sizes = st.builds(
    RequestSize, n_prompt=st.integers(1, 40), max_new_tokens=st.integers(1, 25), n_sequences=st.sampled_from([1, 1, 1, 2, 3])
)
workloads = st.lists(sizes, min_size=1, max_size=6)


@dataclass(kw_only=True, eq=False)
class Simulated:
    """A request without a model."""

    size: RequestSize
    priority: int = 0
    forks: Sequence["Simulated"] = ()
    is_finished: bool = False
    sequence: SequenceCache | None = None
    n_left: int = field(init=False)

    def __post_init__(self) -> None:
        self.n_left = self.size.max_new_tokens


def simulated(size: RequestSize) -> Simulated:
    return Simulated(size=size, forks=[Simulated(size=size) for _ in range(size.n_sequences - 1)])


class Simulation:
    """Runs a workload through the real scheduler and the real bookkeeping of pages, in pools of ``resources``' sizes."""

    def __init__(self, resources: Sequence[Resource], chunk: int, max_n: int) -> None:
        self.scheduler: Scheduler[Simulated] = Scheduler(Reservation([Places(max_n), *resources]), chunk=chunk)

    def new_sequence(self) -> SequenceCache:
        raise NotImplementedError

    def read(self, sequence: SequenceCache, n_new: int, *, is_last: bool) -> None:
        raise NotImplementedError

    def decode(self, sequence: SequenceCache) -> None:
        raise NotImplementedError

    def run(self, workload: Sequence[RequestSize]) -> None:
        requests = [simulated(size) for size in workload]
        for request in requests:
            self.scheduler.add(request)
        while (plan := self.scheduler.schedule()) is not None:
            self._step(plan)
            self.scheduler.complete(plan)
            if plan.reads_last:
                (request,) = plan.requests
                assert request.sequence is not None
                for fork in request.forks:
                    fork.sequence = request.sequence.fork()
                for one in (request, *request.forks):
                    self._generated(one)
            elif plan.phase == "decode":
                for one in plan.requests:
                    self._generated(one)
        assert all(one.is_finished for request in requests for one in (request, *request.forks))
        assert set(self.scheduler.reservation.used) == {0}

    def _step(self, plan: StepPlan[Simulated]) -> None:
        for request in plan.requests:
            if plan.phase == "prefill":
                request.sequence = request.sequence or self.new_sequence()
                self.read(request.sequence, plan.n_tokens, is_last=plan.reads_last)
            else:
                assert request.sequence is not None
                self.decode(request.sequence)

    def _generated(self, request: Simulated) -> None:
        request.n_left -= 1
        if request.n_left == 0:
            assert request.sequence is not None
            request.is_finished = True
            request.sequence.release()
            self.scheduler.remove(request)


class Evicting(Simulation):
    """Layers keep the most that their budgets allow; while decoding they grow by every token, at their share, or not at all."""

    def __init__(
        self,
        pool: HostKvPool,
        budgets: Sequence[LayerBudget | None],
        n_protected: int,
        growth: str,
        chunk: int,
        max_n: int,
        windows: Sequence[int] = (),
    ) -> None:
        self.pool, self.budgets, self.n_protected, self.growth = pool, budgets, n_protected, growth
        self.windows = windows or [0] * len(budgets)
        pages = CachePages(pool, budgets=budgets, n_protected=n_protected, windows=windows, chunk=chunk)
        super().__init__([pages], chunk, max_n)

    def new_sequence(self) -> SequenceCache:
        return SequenceCache(self.pool, n_layers=len(self.budgets), decode_distance=3, windows=self.windows)

    def read(self, sequence: SequenceCache, n_new: int, *, is_last: bool) -> None:
        sequence.append(n_new)
        if is_last:
            n = sequence.num_computed_tokens
            kept = [n if budget is None else min(n, max(budget.of(n), self.n_protected)) for budget in self.budgets]
            held = np.where(self.windows, sequence.kv_len, kept)
            sequence.shrink(held, [k / n for k in kept] if self.growth == "row" else None)
        sequence.free_passed()

    def decode(self, sequence: SequenceCache) -> None:
        before = sequence.kv_len
        sequence.append(1)
        if self.growth == "rank":
            sequence.settle(np.where(self.windows, sequence.kv_len, before))
        sequence.free_passed()


class Recalling(Simulation):
    """The whole cache in a host tier in some layers, with the working sets that ``StreamedRecall`` opens there."""

    def __init__(
        self,
        host: RamTier,
        device: HostKvPool,
        budgets: Sequence[LayerBudget | None],
        limits: PageLimits,
        host_layers: Sequence[int],
        chunk: int,
        max_n: int,
        windows: Sequence[int] = (),
    ) -> None:
        self.windows = windows
        self.host, self.device, self.budgets, self.limits, self.host_layers = host, device, budgets, limits, host_layers
        self.sets: dict[int, WorkingSet] = {}
        self.statistics = None
        resources: list[Resource] = [
            WorkingSetPages(
                device,
                limits=[limits if layer in host_layers else None for layer in range(len(budgets))],
                budgets=budgets,
                windows=windows,
                chunk=chunk,
            ),
            HostPages(host, n_layers=len(host_layers)),
        ]
        super().__init__(resources, chunk, max_n)

    def new_sequence(self) -> SequenceCache:
        return TieredSequence(self, n_layers=len(self.budgets), host_layers=self.host_layers, windows=self.windows)

    def read(self, sequence: SequenceCache, n_new: int, *, is_last: bool) -> None:
        sequence.append(n_new)
        for layer in self.host_layers:
            row = int(sequence.page_table[layer, 0])
            if row not in self.sets:
                self.sets[row] = WorkingSet(self.device, self.limits)
                self.sets[row].open()
        sequence.n_prompt = sequence.num_computed_tokens
        if is_last:
            self._recall_ahead(sequence)
        sequence.free_passed()

    def decode(self, sequence: SequenceCache) -> None:
        sequence.append(1)
        self._recall_ahead(sequence)
        sequence.free_passed()

    def _recall_ahead(self, sequence: SequenceCache) -> None:
        for layer in self.host_layers:
            budget = self.budgets[layer]
            n_budget = sequence.n_prompt if budget is None else budget.of_prompt(sequence.n_prompt)
            n_next = sequence.num_computed_tokens + 1
            n_chosen = min(self.limits.n_chosen(n_budget), len(self.limits.choosable(n_next)))
            self.sets[int(sequence.page_table[layer, 0])].make_room(n_chosen + staging_slots(n_chosen))

    def fork(self, pages: Ints, twin_pages: Ints) -> None:
        twin = self.sets[int(twin_pages[0])] = WorkingSet(self.device, self.limits)
        twin.copy_from(self.sets[int(pages[0])])

    def warm_up(self) -> None:
        """Nothing is compiled."""

    def release(self, rows: Sequence[int]) -> None:
        for row in rows:
            if row in self.sets:
                self.sets.pop(row).release()

    def close(self) -> None:
        """Nothing runs."""


def host_pool(n_pages: int) -> HostKvPool:
    return HostKvPool(n_pages=max(1, n_pages), page_size=PAGE_SIZE, n_kv_heads=1, head_size=1)


@settings(max_examples=150)
@given(
    budgets=many_budgets,
    n_protected=st.integers(0, 12),
    growth=st.sampled_from(["row", "rank", "every"]),
    workload=workloads,
    slack=st.integers(0, 20),
    chunk=st.integers(1, 20),
    windows=windows_of_layers,
)
def test_what_is_reserved_is_enough_in_pools_of_exactly_that_size(
    budgets: list[LayerBudget | None],
    n_protected: int,
    growth: str,
    workload: list[RequestSize],
    slack: int,
    chunk: int,
    windows: list[int],
) -> None:
    windows = windows[: len(budgets)]
    budgets = [ALL if window else budget for budget, window in zip(budgets, windows, strict=True)]
    needs = CachePages(host_pool(1), budgets=budgets, n_protected=n_protected, windows=windows, chunk=chunk)
    pool = host_pool(max(needs.while_reading(size) for size in workload) + slack)
    Evicting(pool, budgets, n_protected, growth, chunk, 3 + slack, windows).run(workload)
    pool.check_integrity([])


@settings(max_examples=150)
@given(
    layers=st.lists(st.tuples(budgets, st.booleans()), min_size=1, max_size=3).filter(lambda ls: any(h for _, h in ls)),
    sinks=st.integers(0, 9),
    recent=st.integers(1, 9),
    workload=workloads,
    slack=st.integers(0, 20),
    chunk=st.integers(1, 20),
    windows=windows_of_layers,
)
def test_what_is_reserved_of_two_tiers_is_enough_in_tiers_of_exactly_that_size(
    layers: list[tuple[LayerBudget | None, bool]],
    sinks: int,
    recent: int,
    workload: list[RequestSize],
    slack: int,
    chunk: int,
    windows: list[int],
) -> None:
    windows = [0 if on_host else window for window, (_, on_host) in zip(windows, layers, strict=False)]
    limits = PageLimits(page_size=PAGE_SIZE, sinks=sinks, recent=recent)
    budgets, host_layers = [b for b, _ in layers], [layer for layer, (_, on_host) in enumerate(layers) if on_host]
    on_device = WorkingSetPages(
        host_pool(1), limits=[limits if h else None for _, h in layers], budgets=budgets, windows=windows, chunk=chunk
    )
    on_host = HostPages(host_pool(1), n_layers=len(host_layers))
    device = host_pool(max(on_device.while_reading(size) for size in workload) + slack)
    n_host = max(on_host.while_reading(size) for size in workload) + slack
    host = RamTier(n_pages=n_host, page_size=PAGE_SIZE, n_kv_heads=1, head_size=1)
    Recalling(host, device, budgets, limits, host_layers, chunk, 3 + slack, windows).run(workload)
    device.check_integrity([])
    host.check_integrity([])


@given(budgets=many_budgets, n_protected=st.integers(0, 12), size=sizes)
def test_reading_reserves_no_page_that_is_not_needed(
    budgets: list[LayerBudget | None], n_protected: int, size: RequestSize
) -> None:
    """But for the last token, which is never cached: one page per layer."""
    size = dataclasses.replace(size, n_sequences=1)
    pool = host_pool(len(budgets) * 40)
    needs = CachePages(pool, budgets=budgets, n_protected=n_protected)
    most = 0

    class Watched(Evicting):
        def _step(self, plan: StepPlan[Simulated]) -> None:
            nonlocal most
            super()._step(plan)
            most = max(most, pool.n_pages - pool.n_free)

        def read(self, sequence: SequenceCache, n_new: int, *, is_last: bool) -> None:
            nonlocal most
            most = max(most, pool.n_pages - pool.n_free)
            super().read(sequence, n_new, is_last=False)
            most = max(most, pool.n_pages - pool.n_free)
            if is_last:
                n = sequence.num_computed_tokens
                prompt = RequestSize(n_prompt=n, max_new_tokens=1)
                kept = [needs._kept_at_most(prompt, layer, budget) for layer, budget in enumerate(budgets)]
                sequence.shrink(np.array(kept), None)

    Watched(pool, budgets, n_protected, "every", 9, 9).run([size])
    assert most <= needs.while_reading(size) <= most + len(budgets)


def _smallest(engine: Engine, lengths: Sequence[int], max_new_tokens: int) -> dict[str, int]:
    """``cache_tokens`` and ``host_tokens`` in which each request fits alone, and not much beside it."""
    found = {}
    n_layers = engine.manifest.cache_config.n_layers
    for resource, option in zip(engine.core.reservation.resources[1:], ("cache_tokens", "host_tokens"), strict=False):
        n_pages = max(resource.while_reading(RequestSize(n_prompt=n, max_new_tokens=max_new_tokens)) for n in lengths)
        if not n_pages:
            continue  # every layer's cache is in the other pool
        n_of_layers = len(engine.runner._host_layers) if option == "host_tokens" else n_layers
        found[option] = -(-n_pages // n_of_layers) * engine.manifest.page_size
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_more_requests_than_fit_all_get_what_they_get_alone(name: str, small_engine: Engine) -> None:
    lengths, new = (61, 9, 40, 23, 61, 55, 2), 24
    params: dict[str, Any] = {"max_new_tokens": new, "temperature": 1.3, "seed": 8}
    with engine_under(small_engine, small_policy(name), **streamed(name)) as roomy:
        prompts = prompts_of(roomy, lengths)
        alone = [roomy.generate(prompt, **params) for prompt in prompts]
        tight_sizes = _smallest(roomy, lengths, new)
    for more in (1.0, 1.6):
        tokens = {option: int(more * n) for option, n in tight_sizes.items()}
        with engine_under(small_engine, small_policy(name), **tokens, **streamed(name)) as tight:
            assert tight.generate_batch(prompts, **params) == alone
            assert_idle(tight)
    option = next(iter(tight_sizes))
    one_less = tight_sizes | {option: tight_sizes[option] - small_engine.manifest.page_size}
    with (
        engine_under(small_engine, small_policy(name), **one_less, **streamed(name)) as small,
        pytest.raises(CapacityError, match=f"{option}="),
    ):
        small.generate_batch(prompts, **params)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_step_for_which_pages_lack_leaves_every_sequence_as_it_was(phase: str, small_engine: Engine) -> None:
    """The reservation bypassed: the second of two sequences finds no page, and the first has not advanced either."""
    with engine_under(small_engine, policy_from_name("full")) as engine:
        runner, pool = engine.runner, engine.runner.pool
        prompts = prompts_of(engine, (10, 20) if phase == "decode" else (10, 2 * CHUNK))
        expected = runner_tokens(engine, prompts)
        sequences = [runner.new_sequence() for _ in prompts]
        logits = [
            runner.prefill(sequence, prompt) if phase == "decode" else runner.prefill(sequence, prompt[:CHUNK], evict=False)
            for sequence, prompt in zip(sequences, prompts, strict=True)
        ]
        n_layers = engine.manifest.config.n_layers
        hoard = pool.new_owner()
        pool.allocate(pool.n_free - n_layers, hoard)

        def state() -> list[Any]:
            return [(s.num_computed_tokens, s.kv_len.tolist(), s.n_prompt, s.is_evicted) for s in sequences]

        before, rest = state(), prompts[1][CHUNK:]
        fed = [int(np.argmax(row)) for row in logits]

        def step() -> Floats:
            return runner.decode(sequences, fed) if phase == "decode" else runner.prefill(sequences[1], rest)

        with pytest.raises(CapacityError, match="KV pool is full"):
            step()
        assert state() == before
        pool.release_owner(hoard)
        np.testing.assert_array_equal(step(), expected[1 if phase == "prefill" else 2])
        for sequence in sequences:
            sequence.release()
        pool.check_integrity([])


def runner_tokens(engine: Engine, prompts: Sequence[list[int]]) -> list[np.ndarray]:
    """Logits after each prompt, and of the step that follows them."""
    sequences = [engine.runner.new_sequence() for _ in prompts]
    logits = [engine.runner.prefill(sequence, prompt) for sequence, prompt in zip(sequences, prompts, strict=True)]
    logits.append(engine.runner.decode(sequences, [int(np.argmax(row)) for row in logits]))
    for sequence in sequences:
        sequence.release()
    return logits


def test_a_fork_reserves_what_it_needs_and_a_family_that_is_too_large_is_refused(small_engine: Engine) -> None:
    size = RequestSize(n_prompt=50, max_new_tokens=20, n_sequences=4)
    with engine_under(small_engine, small_policy("prefixkv_paper"), cache_tokens=120) as engine:
        alone = dataclasses.replace(size, n_sequences=1)
        engine.core.reservation.check(alone)
        with pytest.raises(CapacityError, match="too small for this request"):
            engine.core.reservation.check(size)
    few = engine_under(small_engine, small_policy("prefixkv_paper"), max_sequences=3)
    with few as engine, pytest.raises(CapacityError, match="more sequences of one request than run at once"):
        engine.core.reservation.check(size)
