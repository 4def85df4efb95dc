"""Time per decoded token of a small model whose pages are small: recall beside dropping as many tokens.

Where a step takes tens of ms, what recall does besides attention shows: choosing, bookkeeping, copies. Weights, keys, values
and queries are random (``benchmarks.speed.recall_cache``), and all sides of a context read the same pages.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Check, Report, Row, Target, check_close, take_turns
from benchmarks.models import Shape, exported_model, random_checkpoint
from benchmarks.speed.recall_cache import AS_AT_08, FREEKV, WithQueries, place_prompt
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.kv_rows import KvDtype
from trt_kv.plugins.paging import Floats
from trt_kv.plugins.recall_attention.choice import summaries_of
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.program import PHASES, Program, program_of_model
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.recall.background import ThreadedCopies
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.in_place import MemoryTier, RecallInPlace
from trt_kv.runtime.backends.host.recall.layer import staging_slots
from trt_kv.runtime.backends.host.recall.store import HostTier, host_tier_at
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.model_runner import ModelRunner

WHOLE, FIFTH, SAME, IN_MEMORY, IN_FILE = (
    "whole cache",
    "a fifth is kept",
    "as many as recall attends to are kept",
    "recalled, ram",
    "recalled, file",
)
SMALL = Shape(
    n_layers=30,
    hidden_size=576,
    n_heads=9,
    n_kv_heads=3,
    head_dim=64,
    intermediate_size=1536,
    vocab_size=49152,
    max_positions=2**16,
)
"""The shape of SmolLM2 135M."""
TINY = dataclasses.replace(SMALL, n_layers=2, vocab_size=256)
POLICY = dataclasses.replace(FREEKV, tokens=256, sinks=8, recent=32)
PAGE_SIZE = 8
STEPS_PER_TURN = 3
CHECK_STEPS = 4
GROWTH = 1024
"""Room for generated tokens."""


def run(folder: Path, *, quick: bool) -> Report:
    """All sides at every context."""
    contexts, rounds, shape = ((512,), 3, TINY) if quick else ((2048, 8192), 8, SMALL)
    model = exported_model(random_checkpoint(shape, folder / "checkpoint"), folder / "graphs")
    executor = model.executor()
    checks: list[Check] = []
    rows: list[Row] = []
    targets: list[Target] = []
    for context in contexts:
        sides = _Sides(executor, model.config, context, rounds, folder)
        checks.append(sides.check())
        timings = take_turns(sides.turns, rounds=rounds)
        rows += [{"context_tokens": context, **row} for row in timings.rows(SAME)]
        targets.append(
            Target(
                what=f"a step that recalls from memory / one of a policy that kept as many tokens, at {context} tokens",
                measured=timings.ratio(IN_MEMORY, SAME),
                limit=1.15,
            )
        )
        sides.close()
    return Report(
        title="Decode speed of a small model with small pages: recall beside dropping",
        settings={
            "shape": shape.hf_config,
            "budget_tokens": POLICY.tokens,
            "page_size": PAGE_SIZE,
            "drift": dataclasses.asdict(AS_AT_08),
            "rounds": rounds,
            "steps_per_turn": STEPS_PER_TURN,
        },
        checks=checks,
        tables={f"time per {STEPS_PER_TURN} steps, {shape.n_layers} layers, random caches": rows},
        targets=targets,
    )


class _Sides:
    """The sides at one context."""

    def __init__(self, executor: DenseExecutor, config: ModelConfig, context: int, rounds: int, folder: Path) -> None:
        n_steps = CHECK_STEPS + STEPS_PER_TURN * (rounds + 4)
        self._queries = AS_AT_08.queries(config, n_steps)
        self._dense = WithQueries(executor, self._queries, first=context)
        self._config = config
        self._limits = PageLimits(page_size=PAGE_SIZE, sinks=POLICY.sinks, recent=POLICY.recent)
        self._sizes: dict[str, Any] = {"page_size": PAGE_SIZE, "n_kv_heads": config.n_kv_heads, "head_size": config.head_dim}
        n_read, n_all = (config.n_layers * -(-n // PAGE_SIZE) for n in (context, context + GROWTH))
        tier = MemoryTier(n_pages=n_all, **self._sizes)
        _fill(tier.kv[:n_read])
        summaries = summaries_of(tier.kv[:n_read, 0], 0, KvDtype("float32"))
        self._file = host_tier_at(f"file:{folder}", n_pages=n_all, **self._sizes)
        for page in range(n_read):
            self._file.write(page, tier.kv[page])
        self.steps: dict[str, Callable[[], Floats]] = {
            WHOLE: self._whole(tier, context, context),
            FIFTH: self._whole(tier, context // 5, context),
            SAME: self._whole(tier, POLICY.tokens, context),
            IN_MEMORY: self._in_memory(tier, summaries, context),
            IN_FILE: self._in_file(self._file, summaries, context),
        }
        self.turns = {name: lambda step=step: [step() for _ in range(STEPS_PER_TURN)] for name, step in self.steps.items()}

    def check(self) -> Check:
        """Both tiers give the same logits."""
        logits = [np.stack([self.steps[side]() for _ in range(CHECK_STEPS)]) for side in (IN_MEMORY, IN_FILE)]
        for side in (WHOLE, FIFTH, SAME):
            for _ in range(CHECK_STEPS):
                self.steps[side]()
        return check_close("logits of a cache in memory and of one in a file", *logits, within=0.0)

    def close(self) -> None:
        self._recall.close()

    def _programs(self, policy: Policy) -> dict[str, Program]:
        return {phase: program_of_model(self._config, policy, phase=phase, page_size=PAGE_SIZE) for phase in PHASES}

    def _whole(self, tier: MemoryTier, n_held: int, context: int) -> Callable[[], Floats]:
        """Attends to ``n_held`` tokens, all that it holds, after ``context`` tokens."""
        pool = HostKvPool(n_pages=tier.n_pages, **self._sizes)
        pool.kv = tier.kv
        runner = host_runner(self._dense, pool, self._programs(policy_from_name("full")))
        sequence = runner.new_sequence()
        sequence.append(n_held)
        sequence.num_computed_tokens = context
        return _steps(runner, sequence)

    def _in_memory(self, tier: MemoryTier, summaries: Floats, context: int) -> Callable[[], Floats]:
        recall = RecallInPlace(
            tier, HostKvPool(n_pages=1, **self._sizes), n_layers=self._config.n_layers, n_query_heads=self._config.n_heads
        )
        recall.summaries[: len(summaries)] = summaries
        runner = host_runner(self._dense, recall.device, self._programs(POLICY), recall=recall)
        sequence = runner.new_sequence()
        sequence.append(context)
        sequence.n_prompt = context
        recall.last_query[sequence.page_table[:, 0]] = self._queries[0]
        return _steps(runner, sequence)

    def _in_file(self, host: HostTier, summaries: Floats, context: int) -> Callable[[], Floats]:
        n_chosen = self._limits.n_chosen(POLICY.tokens)
        per_layer = self._limits.n_sinks + self._limits.n_newest + n_chosen + staging_slots(n_chosen)
        pool = HostKvPool(n_pages=self._config.n_layers * per_layer, **self._sizes)
        self._recall = StreamedRecall(host, pool, ThreadedCopies(), n_layers=self._config.n_layers, finds_budgets=False)
        self._recall.summaries[: len(summaries)] = summaries
        runner = host_runner(self._dense, pool, self._programs(POLICY), recall=self._recall)
        sequence = runner.new_sequence()
        place_prompt(self._recall, sequence, self._limits, context, self._queries[0])
        return _steps(runner, sequence)


def _fill(kv: Floats) -> None:
    """Random keys and values, a part at a time."""
    rng = np.random.default_rng(0)
    for first in range(0, len(kv), 256):
        kv[first : first + 256] = rng.standard_normal(kv[first : first + 256].shape, np.float32)


def _steps(runner: ModelRunner, sequence: SequenceCache) -> Callable[[], Floats]:
    def step() -> Floats:
        logits_V: Floats = runner.decode([sequence], [5])[0]
        return logits_V

    return step
