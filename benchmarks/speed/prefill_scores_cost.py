"""Cost of scores, budgets and eviction: prefill under each policy compared with prefill that keeps everything."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import Check, Report, Row, Target, check_close, take_turns
from benchmarks.models import FULL, MASS, WINDOW, Shape, exported_model, model_runner, random_checkpoint, random_tokens
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.paging import Floats
from trt_kv.policies import policy_without_floor
from trt_kv.policy import Policy
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.model_runner import ModelRunner

POLICIES: dict[str, Policy] = {
    "without scores": FULL,
    "window of 32 queries": WINDOW,
    "mass of all queries": MASS,
    **{name: policy_without_floor(name) for name in ("h2o", "snapkv", "reach")},
    "refreekv, no layer exempt": dataclasses.replace(policy_without_floor("refreekv"), exempt_layers=()),
}
LIMIT = 1.5
"""Limit for every policy at the longest context. Scoring costs about as much as attention, and nothing else changes."""


def run(folder: Path, *, quick: bool) -> Report:
    """Prefill of random tokens on a small Llama, scores, budgets and eviction included."""
    shape = Shape(n_layers=2, hidden_size=1024, n_heads=16, n_kv_heads=4, head_dim=64, intermediate_size=2816)
    contexts, rounds = ((256, 512), 2) if quick else ((1024, 8192), 3)
    model = exported_model(random_checkpoint(shape, folder / "checkpoint"), folder / "graphs")
    executor = model.executor()
    runners = {
        name: model_runner(executor, model.config, policy=policy, cache_tokens=max(contexts))
        for name, policy in POLICIES.items()
    }
    checks = _checks(runners, executor, model.config)
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for context in contexts:
        tokens = random_tokens(context, shape.vocab_size)
        sides = {name: _prefill(runner, tokens) for name, runner in runners.items()}
        timings = take_turns(sides, rounds=rounds, warmup=1)
        rows += [{"context_tokens": context, **row} for row in timings.rows("without scores")]
        ratios = {name: timings.ratio(name, "without scores") for name in sides}
    return Report(
        title="Cost of scoring during prefill",
        settings={"shape": shape.hf_config, "chunk_tokens": runners["without scores"].chunk, "rounds": rounds},
        checks=checks,
        tables={"prefill": rows},
        targets=[
            Target(what=f"{name} / without scores at {max(contexts)} tokens", measured=ratio, limit=LIMIT)
            for name, ratio in ratios.items()
            if POLICIES[name].evicts
        ],
    )


def _prefill(runner: ModelRunner, tokens: list[int]) -> Callable[[], Floats]:
    """Prefill into an empty pool, with the policy's eviction; returns the last token's logits [V]."""

    def prefill() -> Floats:
        sequence = runner.new_sequence()
        logits_V = runner.prefill(sequence, tokens)
        sequence.release()
        return logits_V

    return prefill


def _checks(runners: dict[str, ModelRunner], executor: DenseExecutor, config: ModelConfig) -> list[Check]:
    """Check that scoring changes no logit, and that the scores are those of the reference kernel."""
    tokens = random_tokens(96, config.vocab_size)
    plain_V = _prefill(runners["without scores"], tokens)()
    checks = []
    for name, policy in POLICIES.items():
        checks.append(check_close(f"logits, {name}", _prefill(runners[name], tokens)(), plain_V, within=0.0))
        if policy.reads_attention:
            reference = model_runner(executor, config, policy=policy, cache_tokens=len(tokens), implementation="reference")
            expected_LN = reference.importance(tokens)
            checks.append(check_close(f"scores, {name}", runners[name].importance(tokens), expected_LN, within=1e-3))
    return checks
