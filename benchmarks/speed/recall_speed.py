"""Time per decoded token against context: the whole cache, and caches on the host that are recalled ahead, in turn and at once.

Weights, keys, values and queries are random (``benchmarks.speed.recall_cache``). All sides of a context read the same pages:
those of the whole cache's pool, or a file with the same content. A turn of a side is a few steps and all copies that they
start.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numba
import numpy as np
import psutil

from benchmarks.harness import Check, Report, Row, Target, Timings, check_close, take_turns
from benchmarks.models import ExportedModel, exported_model, random_checkpoint
from benchmarks.speed.recall_cache import AS_AT_08, AS_AT_09, CALM, FREEKV, Drift, RecallSide, WithQueries
from benchmarks.speed.recall_sides import (
    AT_ONCE,
    FULL,
    IN_TURN,
    NARROW,
    STREAMED,
    WIDE,
    Pages,
    Side,
    check_placed,
    pages_for,
    recall_sides,
    whole_cache_side,
)
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.paging import Floats
from trt_kv.policy import Policy
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.onnxruntime_segments import OnnxRuntimeExecutor

MIB = 2**20
TIERS = ("ram", "file")
STEPS_PER_TURN = 3
CHECK_STEPS = 3
AGREE_WITHIN = 1e-3


@dataclass(kw_only=True)
class Found:
    """The results so far."""

    checks: list[Check] = field(default_factory=list)
    times: list[Row] = field(default_factory=list)
    overlap: list[Row] = field(default_factory=list)
    moves: list[Row] = field(default_factory=list)
    heads: list[Row] = field(default_factory=list)
    drifts: list[Row] = field(default_factory=list)
    one_core: list[Row] = field(default_factory=list)


def run(folder: Path, *, quick: bool) -> Report:
    """All sides at every context; then other drifts, and one core for the model, at one context."""
    contexts = (2048, 1024) if quick else (131072, 65536, 16384, 4096)
    rounds = 3 if quick else 8
    shape, policy = (NARROW, dataclasses.replace(FREEKV, tokens=512)) if quick else (WIDE, FREEKV)
    model = exported_model(random_checkpoint(shape, folder / "checkpoint"), folder / "graphs")
    config = model.config
    found = Found(checks=[check_placed(folder)])
    pages = pages_for(config, contexts[0], folder)
    middle = contexts[1]
    executor = model.executor()
    for context in contexts:
        _at_context(executor, config, pages, policy, context, rounds, found)
    found.checks.append(_check_budget_of_everything(executor, config, pages, policy, contexts[-1]))
    for drift in (CALM, AS_AT_08, AS_AT_09):
        found.drifts += _in_ram(executor, config, pages, policy, middle, rounds, drift)
    del executor
    with _one_core():
        found.one_core += _in_ram(_executor_of_one_thread(model), config, pages, policy, middle, rounds, AS_AT_08)
    pages.tiers["file"].close()
    longest = {row["side"]: row["median_ms"] for row in found.times if row["context_tokens"] == contexts[0]}
    return Report(
        title="Decode speed with the cache on the host, against context",
        settings={
            "shape": shape.hf_config,
            "budget_tokens": policy.tokens,
            "tau": policy.tau,
            "drift": dataclasses.asdict(AS_AT_08),
            "rounds": rounds,
            "steps_per_turn": STEPS_PER_TURN,
            "copy_threads": 2,
        },
        checks=found.checks,
        tables={
            f"time per step, {shape.n_layers} layers, random caches": found.times,
            "what overlapping is worth": found.overlap,
            "moved per step": found.moves,
            "correction rate of heads, over layers and heads": found.heads,
            f"other drifts, {middle} tokens, ram": found.drifts,
            f"one core for the model and one for the copies, {middle} tokens, ram": found.one_core,
        },
        targets=[
            Target(
                what=f"a streamed step at {contexts[0]} tokens / one over the whole cache",
                measured=round(longest["streamed, ram"] / longest[FULL], 3),
                limit=1.0,
            )
        ],
    )


def _at_context(
    executor: DenseExecutor, config: ModelConfig, pages: Pages, policy: Policy, context: int, rounds: int, found: Found
) -> None:
    """All sides on both tiers. Contexts come in descending order: a whole cache grows into pages of the larger ones."""
    with_queries, first_LHD = _with_queries(executor, config, AS_AT_08, context, rounds)
    sides: dict[str, Side] = {FULL: whole_cache_side(with_queries, config, pages, context)}
    for tier in TIERS:
        sides |= recall_sides(with_queries, config, pages, policy, context, first_LHD, tier)
    found.checks += _warmed_up(sides, context)
    timings, from_disk = _timed(sides, rounds)
    held = {name: _held_bytes(side) for name, side in sides.items()}
    found.times += [
        {
            "context_tokens": context,
            "side": row["side"],
            "device_mib": round(held[row["side"]]["device"] / MIB, 1),
            "host_mib": round(held[row["side"]]["host"] / MIB, 1),
            "summaries_mib": round(held[row["side"]]["summaries"] / MIB, 1),
            **row,
        }
        for row in timings.rows(FULL)
    ]
    for tier in TIERS:
        found.overlap += [
            {
                "context_tokens": context,
                "side": f"{STREAMED}, {tier}",
                "against": f"{other}, {tier}",
                "ratio": timings.ratio(f"{STREAMED}, {tier}", f"{other}, {tier}"),
                "ratio_95_percent": timings.interval(f"{STREAMED}, {tier}", f"{other}, {tier}"),
            }
            for other in (IN_TURN, AT_ONCE)
        ]
    recalled = {name: side for name, side in sides.items() if isinstance(side, RecallSide)}
    found.moves += [_moves(context, name, side, from_disk[name]) for name, side in recalled.items()]
    found.heads.append(_head_rates(context, recalled[f"{STREAMED}, ram"]))
    for side in recalled.values():
        side.close()


def _in_ram(
    executor: DenseExecutor, config: ModelConfig, pages: Pages, policy: Policy, context: int, rounds: int, drift: Drift
) -> list[Row]:
    """The recalling sides alone, in RAM; ratios to the one that does not overlap."""
    with_queries, first_LHD = _with_queries(executor, config, drift, context, rounds)
    sides: dict[str, Side] = dict(recall_sides(with_queries, config, pages, policy, context, first_LHD, "ram"))
    _warmed_up(sides, context)
    timings, _ = _timed(sides, rounds)
    rows = []
    for row in timings.rows(f"{IN_TURN}, ram"):
        side = sides[row["side"]]
        assert isinstance(side, RecallSide)
        counts = side.recall.statistics
        rates = {"head_rate": round(counts.head_rate, 3), "layer_step_rate": round(counts.layer_step_rate, 3)}
        rows.append({"drift": drift.name, "side": row["side"], **rates, **row})
        side.close()
    return rows


def _with_queries(
    executor: DenseExecutor, config: ModelConfig, drift: Drift, context: int, rounds: int
) -> tuple[WithQueries, Floats]:
    n_steps = 1 + CHECK_STEPS + STEPS_PER_TURN * (rounds + 1)
    queries = drift.queries(config, n_steps)
    return WithQueries(executor, queries, first=context), queries[0]


def _warmed_up(sides: Mapping[str, Side], context: int) -> list[Check]:
    """Check over a few steps that sides that choose the same pages give equal results, bit for bit."""
    logits = {name: side.decode(CHECK_STEPS) for name, side in sides.items()}
    for side in sides.values():
        if isinstance(side, RecallSide):
            side.settle()
            side.recall.statistics.reset()
    same = {
        what: [name for name in sides if name.startswith(prefixes)]
        for what, prefixes in (("whatever was copied when", (STREAMED, IN_TURN)), ("on either tier", (AT_ONCE,)))
    }
    return [
        check_close(f"logits at {context} tokens, {what}: {name} and {names[0]}", logits[name], logits[names[0]], within=0.0)
        for what, names in same.items()
        for name in names[1:]
    ]


def _timed(sides: Mapping[str, Side], rounds: int) -> tuple[Timings, dict[str, float]]:
    """Times per step, and MiB per step that came from the disk instead of the system's page cache."""
    process = psutil.Process()
    read = dict.fromkeys(sides, 0)

    def turn(name: str) -> None:
        before = process.io_counters().read_bytes
        sides[name].turn(STEPS_PER_TURN)
        read[name] += process.io_counters().read_bytes - before

    turns = take_turns({name: functools.partial(turn, name) for name in sides}, rounds=rounds, warmup=1)
    timings = Timings(samples_ms={name: times / STEPS_PER_TURN for name, times in turns.samples_ms.items()})
    return timings, {name: n_bytes / MIB / STEPS_PER_TURN / (rounds + 1) for name, n_bytes in read.items()}


def _held_bytes(side: Side) -> Mapping[str, int]:
    if isinstance(side, RecallSide):
        return side.recall.used_bytes
    return {"device": side.runner.pool.used_bytes, "host": 0, "summaries": 0}


def _moves(context: int, name: str, side: RecallSide, from_disk_mib: float) -> Row:
    """``page_heads``: one KV head's keys and values of a page. Every layer-step attends to the same number of them."""
    counts = side.recall.statistics
    n_layer_steps = int(counts.layer_steps_L.sum())
    n_steps = n_layer_steps / counts.n_layers
    return {
        "context_tokens": context,
        "side": name,
        "corrected_heads": round(counts.head_rate, 3),
        "corrected_layer_steps": round(counts.layer_step_rate, 3),
        "page_heads_ahead_per_layer_step": round(float(counts.moved_ahead_L.sum()) / n_layer_steps, 1),
        "page_heads_at_once_per_layer_step": round(float(counts.moved_at_once_L.sum()) / n_layer_steps, 1),
        "moved_mib_per_step": round(counts.moved_bytes / MIB / n_steps, 2),
        "from_disk_mib_per_step": round(from_disk_mib, 2),
        "waited_ms_per_step": round(counts.waited_ms / n_steps, 2),
    }


def _head_rates(context: int, side: RecallSide) -> Row:
    counts = side.recall.statistics
    rates_LK = counts.corrected_LK / counts.layer_steps_L[:, None]
    p10, median, p90 = np.percentile(rates_LK, [10, 50, 90])
    return {
        "context_tokens": context,
        "heads": rates_LK.size,
        "steps": int(counts.layer_steps_L[0]),
        "p10": round(p10, 3),
        "median": round(median, 3),
        "p90": round(p90, 3),
    }


def _check_budget_of_everything(
    executor: DenseExecutor, config: ModelConfig, pages: Pages, policy: Policy, context: int
) -> Check:
    """Check that recall with a budget for every token equals the whole cache."""
    with_queries, first_LHD = _with_queries(executor, config, AS_AT_08, context, rounds=1)
    whole = whole_cache_side(with_queries, config, pages, context).decode(CHECK_STEPS)
    everything = dataclasses.replace(policy, tokens=2 * context)
    sides = recall_sides(with_queries, config, pages, everything, context, first_LHD, "ram")
    recalled = sides[f"{STREAMED}, ram"].decode(CHECK_STEPS)
    for side in sides.values():
        side.close()
    return check_close(
        f"logits at {context} tokens, whole cache and a budget of everything", recalled, whole, within=AGREE_WITHIN
    )


def _executor_of_one_thread(model: ExportedModel) -> OnnxRuntimeExecutor:
    return OnnxRuntimeExecutor(model.folder, model.segments, model.ports, n_threads=1)


@contextmanager
def _one_core() -> Iterator[None]:
    """Run our kernels on one thread, too."""
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        yield
    finally:
        numba.set_num_threads(before)
