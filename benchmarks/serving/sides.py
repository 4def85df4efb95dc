"""Two ways to serve the same requests on the same runner: the engine core, and static batching in groups."""

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.models import host_pool, model_runner, programs_of
from benchmarks.serving.traffic import Arrival, Served, sleep_until
from trt_kv.model_config import ModelConfig
from trt_kv.policy import Policy
from trt_kv.program import budgets_of
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.engine_core import EngineCore
from trt_kv.runtime.model_runner import DEFAULT_CHUNK, ModelRunner
from trt_kv.runtime.request import Request
from trt_kv.runtime.reservation import CachePages, Places, Reservation

GROUP = 8
"""Requests of a static group."""


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model under a policy; ``kept_shares`` from a recipe. Caches have room for ``cache_tokens`` in every layer."""

    executor: DenseExecutor
    config: ModelConfig
    policy: Policy
    kept_shares: list[float] | None = None
    cache_tokens: int = 16384

    def runner(self, chunk: int = DEFAULT_CHUNK) -> ModelRunner:
        """A runner with its own pool and compiled kernels."""
        runner = model_runner(
            self.executor,
            self.config,
            pool=host_pool(self.config, self.cache_tokens),
            policy=self.policy,
            kept_shares=self.kept_shares,
            chunk=chunk,
        )
        runner.warm_up()
        return runner

    def core(self, *, max_sequences: int, chunk: int) -> EngineCore:
        """A core configured as in an engine."""
        runner = self.runner(chunk)
        budgets = budgets_of(programs_of(self.policy, self.config, kept_shares=self.kept_shares)["prefill"])
        pages = CachePages(runner.pool, budgets=budgets, n_protected=self.policy.sinks + self.policy.recent)
        return EngineCore(runner, Reservation([Places(max_sequences), pages]))


def serve_continuously(core: EngineCore, arrivals: Sequence[Arrival]) -> Served:
    """Pass each request to the core when it arrives; steps run in this thread."""
    start, steps_before = time.monotonic(), core.statistics.decode_steps
    due, requests, live = deque(arrivals), list[Request](), list[Request]()
    while due or live:
        now = time.monotonic() - start
        arrived = [due.popleft().request(start) for _ in range(len(due)) if due[0].at_s <= now]
        core.add(arrived)
        requests += arrived
        live = [request for request in (*live, *arrived) if not request.is_finished]
        next_arrival = start + due[0].at_s if due else math.inf
        if live:
            _run_until(core, live, next_arrival)
        elif due:
            sleep_until(next_arrival)
    return Served(requests=requests, decode_steps=core.statistics.decode_steps - steps_before)


def _run_until(core: EngineCore, live: Sequence[Request], moment: float) -> None:
    """Run steps until ``moment``, or until all of ``live`` have ended."""
    core.wait(lambda: time.monotonic() >= moment or all(request.is_finished for request in live))


def serve_in_groups(runner: ModelRunner, arrivals: Sequence[Arrival]) -> Served:
    """Static batching: up to ``GROUP`` waiting requests start together. Their prompts are prefilled one after the other, they
    decode together, without those that have ended, and the next group starts when all have ended.
    """
    start, steps = time.monotonic(), 0
    due, requests = deque(arrivals), list[Request]()
    while due:
        sleep_until(start + due[0].at_s)
        now = time.monotonic() - start
        group = [due.popleft().request(start) for _ in range(min(GROUP, len(due))) if due[0].at_s <= now]
        steps += _run_group(runner, group)
        requests += group
    return Served(requests=requests, decode_steps=steps)


def _run_group(runner: ModelRunner, group: Sequence[Request]) -> int:
    """Run a group to its end; returns the number of decode steps."""
    for request in group:
        request.held_sequence = runner.new_sequence()
        request.accept(runner.prefill(request.sequence, request.prompt_ids))
    steps = 0
    while running := [request for request in group if not request.is_finished]:
        logits_BV = runner.decode([request.sequence for request in running], [request.token_ids[-1] for request in running])
        for request, logits_V in zip(running, logits_BV, strict=True):
            request.accept(logits_V)
        steps += 1
    for request in group:
        request.close()
    return steps
