"""Time per decoded token and KV bytes: the whole cache compared with PrefixKV at 50 % and 20 %, for growing contexts."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import Check, Report, Row, check_close, take_turns
from benchmarks.models import (
    FULL,
    PREFIXKV,
    ExportedModel,
    Shape,
    calibrated_shares,
    exported_model,
    model_runner,
    random_checkpoint,
    random_tokens,
)
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.plugins.paging import Floats
from trt_kv.policy import kept_tokens
from trt_kv.presets import preset
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.model_runner import ModelRunner

MIB = 2**20
BUDGETS = (0.5, 0.2)
AGREE_WITHIN = 1e-3
HEADROOM = 256


@dataclass(frozen=True, kw_only=True)
class Side:
    """A sequence whose cache has been filled and, under PrefixKV, compressed; and the runner that continues it."""

    runner: ModelRunner
    sequence: SequenceCache

    def decode(self) -> Floats:
        """One step, which also makes the context a token longer; logits [V]."""
        logits_V: Floats = self.runner.decode([self.sequence], [5])[0]
        return logits_V


def run(folder: Path, *, quick: bool) -> Report:
    """The bundled model with real prompts and recipes, and the layer shapes of Llama 3.2 1B with random weights and caches."""
    rounds = 5 if quick else 40
    bundled = open_checkpoint(preset("llama3").bundled_folder)
    bundled_rows, checks = _bundled(bundled, folder, contexts=(256, 512) if quick else (1024, 4096, 8192), rounds=rounds)
    shape = Shape(n_layers=1 if quick else 4, hidden_size=2048, n_heads=32, n_kv_heads=8, head_dim=64, intermediate_size=8192)
    model = exported_model(random_checkpoint(shape, folder / "wide"), folder / "wide-graphs")
    wide_rows, wide_checks = _wide(model, contexts=(1024, 2048) if quick else (8192, 32768), rounds=rounds // 2)
    return Report(
        title="Decode speed and KV memory against context",
        settings={"rounds": rounds, "batch": 1, "wide_shape": shape.hf_config},
        checks=[*checks, *wide_checks],
        tables={
            f"bundled {bundled.name}, calibrated recipes": bundled_rows,
            f"{shape.n_layers} layers as in Llama 3.2 1B, random caches, equal shares": wide_rows,
        },
    )


def _bundled(checkpoint: Checkpoint, folder: Path, *, contexts: Sequence[int], rounds: int) -> tuple[list[Row], list[Check]]:
    model = exported_model(checkpoint, folder / "bundled")
    executor = model.executor()
    recipes = _recipes(checkpoint, model, executor)
    rows: list[Row] = []
    checks: list[Check] = []
    for context in contexts:
        tokens = random_tokens(context, model.config.vocab_size)
        sides = {}
        for name, shares in recipes.items():
            policy = FULL if shares is None else PREFIXKV
            runner = model_runner(executor, model.config, policy=policy, kept_shares=shares, cache_tokens=context + HEADROOM)
            sides[name] = Side(runner=runner, sequence=runner.new_sequence())
            runner.prefill(sides[name].sequence, tokens)
        checks += _checks(model, executor, sides, context)
        rows += _rows(sides, context, rounds)
    return rows, checks


def _recipes(checkpoint: Checkpoint, model: ExportedModel, executor: DenseExecutor) -> dict[str, list[float] | None]:
    """Kept shares per layer of each side; None for the whole cache."""
    shares = calibrated_shares(checkpoint, model, executor, budgets=BUDGETS)
    return {"full": None} | {f"prefixkv_paper {budget:.0%}": kept for budget, kept in shares.items()}


def _wide(model: ExportedModel, *, contexts: Sequence[int], rounds: int) -> tuple[list[Row], list[Check]]:
    """Caches filled with random numbers: decoding speed does not depend on the content, and a prefill would take minutes."""
    executor = model.executor()
    rows: list[Row] = []
    checks: list[Check] = []
    runner = model_runner(executor, model.config, cache_tokens=2 * max(contexts))
    runner.pool.kv[:] = np.random.default_rng(0).standard_normal(runner.pool.kv.shape, np.float32)
    runner.pool.token_positions[:] = 0
    for context in contexts:
        sides = {}
        for share in (*BUDGETS, 1.0):
            name = "full" if share == 1.0 else f"prefixkv_paper {share:.0%}"
            sides[name] = Side(runner=runner, sequence=_filled_sequence(runner, context, share))
        sides = dict(reversed(sides.items()))
        checks += _checks(model, executor, sides, context)
        rows += _rows(sides, context, rounds)
        for side in sides.values():
            side.sequence.release()
    return rows, checks


def _filled_sequence(runner: ModelRunner, context: int, share: float) -> SequenceCache:
    """A sequence after ``context`` tokens that keeps a share of them in every layer; the content of its pages is arbitrary."""
    sequence = runner.new_sequence()
    sequence.append(context)
    if share < 1.0:
        sequence.shrink(np.full(sequence.n_layers, kept_tokens(context, share)), [share] * sequence.n_layers)
    return sequence


def _checks(model: ExportedModel, executor: DenseExecutor, sides: Mapping[str, Side], context: int) -> list[Check]:
    """Check each side's step against the reference kernels on the same cache."""
    checks = []
    for name, side in sides.items():
        pool = side.runner.pool
        reference = model_runner(executor, model.config, pool=pool, implementation="reference")
        twin = copy.deepcopy(side.sequence, {id(pool): pool})
        (expected_V,) = reference.decode([twin], [5])
        checks.append(check_close(f"logits of {name} at {context} tokens", side.decode(), expected_V, within=AGREE_WITHIN))
    return checks


def _rows(sides: Mapping[str, Side], context: int, rounds: int) -> list[Row]:
    held = {name: len(side.sequence.pages) * side.runner.pool.page_bytes / MIB for name, side in sides.items()}
    timings = take_turns({name: side.decode for name, side in sides.items()}, rounds=rounds)
    return [
        {"context_tokens": context, "side": row["side"], "kv_mib": round(held[row["side"]], 2), **row}
        for row in timings.rows("full")
    ]
