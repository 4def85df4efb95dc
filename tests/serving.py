"""Small engines of any policy, none of which is built: the dense pieces of one engine under the KV ops of another policy."""

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from tests.engines import predictors_for, random_ids
from trt_kv.cache_layers import heads_apart
from trt_kv.plugins.paging import Floats
from trt_kv.policies import policy_without_floor
from trt_kv.policy import Policy
from trt_kv.policy_settings import policy_with
from trt_kv.program import PHASES, program_of_model
from trt_kv.runtime.backends.host import load as host_load
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.cache.draws import draws_of
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.loading import Loaded, LoadOptions
from trt_kv.runtime.prefix.opening import open_prefixes
from trt_kv.runtime.request import Request
from trt_kv.runtime.reservation import Places, Reservation
from trt_kv.runtime.scheduler import StepPlan

SHARES = (0.6, 0.3, 0.9)
CHUNK = 16
RECALLING: dict[str, Any] = {"tokens": 30, "sinks": 5, "recent": 5, "tau": 0.5}
SETTINGS: dict[str, dict[str, Any]] = {
    "freekv": RECALLING,
    "bestkey": RECALLING,
    "quest": RECALLING | {"tau": 1.01},
    "arkvale": RECALLING | {"tau": 1.01},
    "snapkv": {"window": 16, "recent": 16},
    "pyramidkv": {"window": 16, "recent": 16},
    "defensivekv_v": {"window": 16, "recent": 16},
    "randomdecode": {"draw_tokens": 8},
    "kvzap": {"recent": 9, "kept": 0.3},
}
"""What presets need to evict anything from the prompts of these tests."""


def small_policy(name: str) -> Policy:
    return policy_with(policy_without_floor(name), SETTINGS.get(name, {}))


def streamed(name: str) -> dict[str, Any]:
    """Options for freekv: a tier in a file, so that pages are copied. The other policies that recall read theirs in memory."""
    return {"host_tier": f"file:{tempfile.gettempdir()}"} if name == "freekv" else {}


def engine_under(dense: Engine, policy: Policy, *, windows: Any = (), **options: Any) -> Engine:
    """An engine with the dense pieces of the small engine ``dense`` under ``policy``; options as for ``Engine.load``, but the
    prefix cache is off unless they say otherwise. ``windows``: of its layers.
    """
    steps = dense.runner._executor
    assert isinstance(steps, SplitStepExecutor)
    page_size, config = dense.manifest.page_size, dataclasses.replace(dense.manifest.config, windows=tuple(windows))
    shares = [share * (0.8**head) for share in SHARES for head in range(heads_apart(config, policy))]
    predictors = predictors_for(policy, config, heads_apart=heads_apart(config, policy))
    programs = {
        phase: program_of_model(config, policy, phase=phase, page_size=page_size, kept_shares=shares, predictors=predictors)
        for phase in PHASES
    }
    manifest = dataclasses.replace(dense.manifest, config=config, policy=policy, programs=programs)
    host = {"host_tokens": 900} if policy.recalls else {}
    of_load = LoadOptions(**({"cache_tokens": 900, "chunk": CHUNK, "prefix_cache": False} | host | options))
    pool, recall = host_load._memory(manifest, of_load, 2**30)
    runner = host_runner(
        steps.dense,
        pool,
        programs,
        chunk=of_load.chunk,
        decode=policy.decode,
        decode_distance=policy.decode_distance,
        reading_reserve=policy.reading_reserve,
        draws=draws_of(policy),
        recall=recall,
    )
    reservation = Reservation([Places(of_load.max_sequences or 50), *host_load._pages(manifest, runner, of_load.chunk)])
    prefixes = open_prefixes(manifest, runner, of_load) if of_load.prefix_cache else None
    loaded = Loaded(runner=runner, reservation=reservation, token_budget=of_load.token_budget, prefixes=prefixes)
    return Engine(dense.folder, manifest, loaded, dense.tokenizer)


def assert_idle(engine: Engine) -> None:
    """Nothing waits, runs, is reserved or holds a page."""
    assert engine.core._live == engine.core._inbox == []
    assert engine.core._scheduler.n_waiting == engine.core._scheduler.n_running == 0
    assert set(engine.core.reservation.used) == {0}
    engine.runner.pool.check_integrity([])
    if isinstance(engine.runner.tiers, StreamedRecall):
        engine.runner.tiers.host.check_integrity([])
        assert not engine.runner.tiers.sets


def prompts_of(engine: Engine, lengths: Sequence[int]) -> list[list[int]]:
    """Prompts that differ from their second token on."""
    return [random_ids(engine, n, seed=100 + at) for at, n in enumerate(lengths)]


Change = Callable[[StepPlan[Request], Floats], Floats]


@contextmanager
def steps_changed(engine: Engine, change: Change) -> Iterator[None]:
    """Every step's logits pass through ``change``, which may also look at them, or raise."""
    original = engine.runner.run

    def run(plan: StepPlan[Request]) -> Floats:
        return change(plan, original(plan))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.runner, "run", run)
        yield


class Recorder:
    """The logits of every token of every request, and how many steps there were."""

    def __init__(self) -> None:
        self.logits: dict[Request, list[bytes]] = {}
        self.n_steps = 0

    def __call__(self, plan: StepPlan[Request], logits: Floats) -> Floats:
        self.n_steps += 1
        if plan.phase == "decode" or plan.reads_last:
            for request, logits_V in zip(plan.requests, logits, strict=True):
                for one in (request, *(request.forks if plan.phase == "prefill" else ())):
                    self.logits.setdefault(one, []).append(np.asarray(logits_V).tobytes())
        return logits
