"""Worlds in which streamed recall is compared with the op it runs: random models, and a scheduler that chooses the order.

L layers, H query heads, K KV heads, D head size, N tokens, V vocabulary.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.kv_rows import KvDtype, store
from trt_kv.plugins.paging import Floats, Ints
from trt_kv.plugins.recall_attention.page_counts import summary_rows
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.policy_settings import policy_with
from trt_kv.program import PAGE_SUMMARIES, PHASES, finds_budgets, program_of
from trt_kv.runtime.backends.base import Attend
from trt_kv.runtime.backends.host.recall import working_set
from trt_kv.runtime.backends.host.recall.background import Copies, Job
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.store import HostTier, RamTier
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.model_runner import ModelRunner

working_set.MOVES_AT_A_TIME = 1  # a job can be paused between any two copies
VOCABULARY = 29
SMALL: dict[str, Any] = {"tokens": 24, "sinks": 3, "recent": 5, "tau": 0.6}


def freekv(**settings: Any) -> Policy:
    """FreeKV with a budget that is small beside the prompts of these tests, and parts of it replaced."""
    return policy_with(policy_from_name("freekv"), SMALL | settings if settings.get("budget") is None else settings)


@dataclass(frozen=True, kw_only=True)
class RandomModel:
    """A decoder with random weights whose queries turn slowly: ``steadiness`` is about the cosine of adjacent ones."""

    seed: int = 0
    n_layers: int = 3
    n_heads: int = 4
    n_kv_heads: int = 2
    head_size: int = 6
    steadiness: float = 0.7
    max_positions: int = 400

    description = "a random model"

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        width = self.n_heads * self.head_size
        sizes = {"q": width, "k": self.n_kv_heads * self.head_size, "v": self.n_kv_heads * self.head_size, "o": width}
        weights = {
            name: rng.standard_normal((self.n_layers, width, size), np.float32) / np.float32(width**0.5)
            for name, size in sizes.items()
        }
        noise = rng.standard_normal((self.max_positions, self.n_layers, width), np.float32)
        for at in range(1, self.max_positions):
            noise[at] = self.steadiness * noise[at - 1] + (1 - self.steadiness**2) ** 0.5 * noise[at]
        object.__setattr__(self, "_weights", weights)
        object.__setattr__(self, "_turns", noise)
        object.__setattr__(self, "_embedding", rng.standard_normal((VOCABULARY, width), np.float32))

    def run(self, input_ids: Ints, positions: Ints, logit_rows: Ints, attend: Attend) -> Floats:
        """See ``DenseExecutor.run``."""
        weights, turns, embedding = (vars(self)[name] for name in ("_weights", "_turns", "_embedding"))
        x = embedding[input_ids]
        heads = (len(x), self.n_heads, self.head_size), (len(x), self.n_kv_heads, self.head_size)
        for layer in range(self.n_layers):
            q = np.tanh(x @ weights["q"][layer]) * np.float32(0.5) + turns[positions, layer]
            k, v = (np.ascontiguousarray(np.tanh(x @ weights[name][layer]).reshape(heads[1])) for name in "kv")
            out = attend(layer, np.ascontiguousarray(q.reshape(heads[0])), k, v)
            x = x + np.tanh(out.reshape(len(x), -1) @ weights["o"][layer])
        logits: Floats = x[logit_rows] @ embedding.T
        return logits


class StepwiseCopies:
    """Runs jobs a step at a time, in an order drawn by chance: some at once, some at the last moment, any number in between.

    ``eagerness`` 1 does all that may be done as soon as a job comes, 0 nothing before somebody waits. Only what a job itself
    waits for is respected. ``fail_at``: the step, counted over all jobs, in which a copy fails.
    """

    def __init__(self, seed: int = 0, *, eagerness: float = 0.5, fail_at: int | None = None) -> None:
        self._random = random.Random(seed)
        self._eagerness = eagerness
        self.fail_at = fail_at
        self._running: list[tuple[Job, Iterator[Event | None]]] = []
        self._parked: dict[int, Event] = {}
        self.n_steps = 0

    def submit(self, job: Job) -> None:
        self._running.append((job, job.steps()))
        while self._random.random() < self._eagerness and self._advance_any():
            pass

    def settle(self, job: Job) -> None:
        while not job.done.is_set():
            assert self._advance_any(), f"{job.what}: everything waits for something that nobody does"

    def close(self) -> None:
        """Nothing runs by itself."""

    def _advance_any(self) -> bool:
        ready = [entry for entry in self._running if self._may_run(entry[0])]
        if not ready:
            return False
        job, steps = self._random.choice(ready)
        self.n_steps += 1
        error: BaseException | None = None
        try:
            if self.n_steps == self.fail_at:
                raise OSError("the test made this copy fail")
            event = next(steps)
        except StopIteration:
            pass
        except OSError as raised:
            error = raised
        else:
            if event is not None:
                self._parked[id(job)] = event
            return True
        self._running = [entry for entry in self._running if entry[0] is not job]
        job.finish(error)
        return True

    def _may_run(self, job: Job) -> bool:
        event = self._parked.get(id(job))
        if event is not None and event.is_set():
            del self._parked[id(job)]
            event = None
        return event is None


def poisoned_tier(n_pages: int, model: RandomModel, page_size: int, dtype: str = "float32") -> RamTier:
    """A tier in memory in which everything that was never written is not a number."""
    tier = RamTier(n_pages=n_pages, page_size=page_size, n_kv_heads=model.n_kv_heads, head_size=model.head_size, dtype=dtype)
    tier._kv[:] = poison(model.head_size, dtype)
    return tier


def poison(head_size: int, dtype: str) -> NDArray[Any]:
    """A stored row [W] that is not a number."""
    return store(np.full(head_size, np.nan, np.float32), KvDtype(dtype))


def runner_of(
    model: RandomModel,
    policy: Policy,
    *,
    copies: Copies | None = None,
    host: HostTier | None = None,
    page_size: int = 4,
    chunk: int = 16,
    n_pages: int = 600,
    dtype: str = "float32",
) -> ModelRunner:
    """A runner that streams with ``copies``; without them one that runs the op itself over the whole cache."""
    scale = model.head_size**-0.5
    programs = {
        phase: program_of(policy, phase=phase, n_layers=model.n_layers, scale=scale, page_size=page_size) for phase in PHASES
    }
    pool = HostKvPool(
        n_pages=n_pages,
        page_size=page_size,
        n_kv_heads=model.n_kv_heads,
        head_size=model.head_size,
        dtype=dtype,
        n_query_heads=model.n_heads if copies is None else 0,
    )
    pool.kv[:] = poison(model.head_size, dtype)
    recall = None
    if copies is not None:
        recall = StreamedRecall(
            host or poisoned_tier(n_pages, model, page_size, dtype),
            pool,
            copies,
            n_layers=model.n_layers,
            finds_budgets=finds_budgets(programs["prefill"]),
            summary_rows=summary_rows(PAGE_SUMMARIES[policy.page_summary], page_size, dtype),
        )
    return host_runner(model, pool, programs, chunk=chunk, decode=policy.decode, recall=recall)


def prompt_of(n_tokens: int, *, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(VOCABULARY, size=n_tokens)]


def generate(runner: ModelRunner, prompt: list[int], n_new: int) -> Floats:
    """Logits [n_new, V] of a greedy generation; everything is given back, and nothing is lost."""
    sequence = runner.new_sequence()
    logits = [runner.prefill(sequence, prompt)]
    while len(logits) < n_new:
        logits.append(runner.decode([sequence], [int(logits[-1].argmax())])[0])
    sequence.release()
    check_integrity(runner)
    return np.stack(logits)


def check_integrity(runner: ModelRunner, *living: SequenceCache) -> None:
    """Every page of every tier is free, or is one living sequence's."""
    on_device = [page for sequence in living for page in sequence.pages]
    if isinstance(runner.tiers, StreamedRecall):
        runner.tiers.host.check_integrity(page for s in living for page in s.pages_in(runner.tiers.host))
        on_device += [page for working_set in runner.tiers.sets.values() for page in working_set.pages]
    runner.pool.check_integrity(on_device)
