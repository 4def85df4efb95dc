"""Decode steps of Llama 3.1 8B's shape with the cache in pinned host memory, at given correction rates: overlapped recall
driven by the device, compared with synchronous retrieval, corrections decided by the host, and the whole cache on the device.

Weights, keys and values are random, and there is no prefill.
"""

import dataclasses
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from triton import TritonError

from benchmarks.gpu.device import WARMUP, on_gpu, pinned_bandwidth, recorded, times
from benchmarks.gpu.freekv_checks import Beginning
from benchmarks.gpu.freekv_model import DTYPE, STEADY, TURNED, Corrections, Dense, Shape, WholeCache
from benchmarks.gpu.freekv_steps import LAUNCHED, OURS, STREAMED, SYNCHRONOUS, Sequences, Step, Tiers
from benchmarks.gpu.freekv_tables import HEADS, RATES, overview, targets_of
from benchmarks.gpu.kernel_timeline import hidden_work, profiled_steps, tells_streams_apart, to_json, wake_profiler
from benchmarks.harness import Check, Report, Row, Timings

SMALL = Shape(
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_size=6,
    hidden=8,
    intermediate=12,
    vocabulary=20,
    page_size=4,
    budget_tokens=24,
    sinks=3,
    recent=5,
    host_pages=80,
    most_sequences=2,
    most_tokens=64,
    rounds=1,
)
COMBINATIONS = ((32768, 1), (131072, 1), (131072, 8), (32768, 4), (131072, 4), (32768, 8))
"""Tokens and sequences, most important first, because time may run out."""
PICTURED = Corrections(layer_steps=0.5, heads=HEADS)
WHOLE, NO_ATTENTION = "whole cache on the device", "no attention at all"
LIMIT_S = 100.0
"""After this time remaining combinations are skipped and noted, and the timeline is made, which takes seconds."""
FAILURES = (RuntimeError, MemoryError, TritonError)
"""Errors that fail one combination but not the others: out of memory, CUDA errors, a kernel that is too large."""


class Bench:
    """The state of the section while it measures, and its results so far."""

    def __init__(self, shape: Shape, limit_s: float) -> None:
        self._start, self._limit_s, self.shape = time.monotonic(), limit_s, shape
        self.rows: list[Row] = []
        self.checks: list[Check] = []
        self.notes: list[str] = []
        self.left_out: list[str] = []
        self.distinct_pages: dict[str, float] = {}
        self.dense = Dense(shape)
        self.say(f"weights of {self.dense.n_bytes / 2**30:.1f} GiB")
        self.tiers = Tiers(shape)
        self.say(f"{shape.host_pages} host pages pinned, filled and summed up")

    def say(self, what: str) -> None:
        print(f"[{time.monotonic() - self._start:6.1f} s] {what}", flush=True)

    @property
    def is_late(self) -> bool:
        return time.monotonic() - self._start > self._limit_s

    def attempt(self, what: str, run: Callable[[], object], *, always: bool = False) -> None:
        """Run ``action`` and free its memory; a failure becomes a note. ``always``: run it even if time is over."""
        if self.is_late and not always:
            self.left_out.append(what)
            return
        for part in (run, self._free):
            try:
                part()
            except FAILURES as error:
                self.notes.append(f"{what}: {type(error).__name__}: {str(error)[:300]}")
                self.say(self.notes[-1])
        self.say(f"{what}: done")

    def _free(self) -> None:
        self.tiers.recall.release(self.tiers.recall.sets.rows)
        gc.collect()
        if on_gpu():
            torch.cuda.empty_cache()

    def sequences(self, n_tokens: int, batch: int, n_rates: int) -> Sequences:
        """Sequences with room to grow for all sides in turns, for recording graphs and for the checks."""
        warmup = WARMUP if on_gpu() else 0
        n_steps = (len(STREAMED) + 1) * (self.shape.rounds + warmup) + 4
        room = n_rates * n_steps + 4 * warmup + 8
        return Sequences(self.tiers, self.shape, self.dense, n_tokens, batch, room=room, n_steps=n_steps)


def run(*, quick: bool) -> Report:
    """FreeKV's budget of 2048 tokens, at 32k and 128k tokens, batch 1, 4 and 8."""
    shape = SMALL if quick else Shape()
    bandwidth = pinned_bandwidth(quick=quick)
    bench = Bench(shape, LIMIT_S)
    combinations, rates = (((61, 2),), (PICTURED,)) if quick else (COMBINATIONS, RATES)
    for n_tokens, batch in combinations:
        bench.attempt(f"{n_tokens} tokens, batch {batch}", partial(_measure, bench, n_tokens, batch, rates))
    timeline: dict[str, Any] = {}
    hidden: list[Row] = []
    if on_gpu() and not quick:
        bench.attempt("timeline", lambda: timeline.update(_timeline(bench, hidden)), always=True)
    else:
        bench.notes.append("timeline: not made, kernels are profiled on a GPU only")
    targets = [] if quick else targets_of(bench.rows, OURS.name)
    tables = {"ms per step, by share of layer-steps corrected": overview(bench.rows), "medians": bench.rows}
    return Report(
        title="Decode steps with the cache in pinned host memory, by how many layer-steps are corrected",
        settings={
            "shape": dataclasses.asdict(shape),
            "dtype": DTYPE,
            "policy": dataclasses.asdict(shape.policy),
            "cosine_of_contents": {"steady": STEADY, "corrected": TURNED},
            "layers_measured": f"all {shape.n_layers}, distinct weights",
            "pinned_gb_per_s": round(bandwidth / 1e9, 2),
            "distinct_host_pages_share": bench.distinct_pages,
            "left_out": bench.left_out,
            "notes": bench.notes,
            "timeline": timeline or None,
        },
        checks=bench.checks,
        tables={name: rows for name, rows in (*tables.items(), ("the profiled steps", hidden)) if rows},
        targets=targets,
    )


def _measure(bench: Bench, n_tokens: int, batch: int, rates: Sequence[Corrections]) -> None:
    """All rates at one context and batch. All sides are checked at the first one."""
    sequences = bench.sequences(n_tokens, batch, len(rates))
    bench.distinct_pages[f"{n_tokens} tokens, batch {batch}"] = round(sequences.distinct_share, 3)
    beginning = None if bench.checks else Beginning(sequences)
    steps = {side.name: Step(sequences, side) for side in (*STREAMED, SYNCHRONOUS)}
    bench.say(f"{n_tokens} tokens, batch {batch}: recorded")
    if beginning is not None:
        bench.checks += beginning.check(steps.values(), PICTURED)
        del beginning
        bench.say("checked: attention of all sides is that over the whole cache")
    bench.rows += _resident_rows(bench, n_tokens, batch)
    for corrections in rates:
        what = (
            f"{n_tokens} tokens, batch {batch}, {corrections.layer_steps:.0%} corrected in {corrections.heads:.1%} of KV heads"
        )
        if bench.is_late:
            bench.left_out.append(what)
            continue
        rows = _recall_rows(sequences, steps, corrections)
        bench.rows += rows
        bench.say(f"{what}: " + ", ".join(f"{row['side']} {row['median_ms']}" for row in rows))


def _resident_rows(bench: Bench, n_tokens: int, batch: int) -> list[Row]:
    """The whole cache on the device, if it fits beside the weights, and a step without attention as the lower bound."""
    shape, sides = bench.shape, {}
    n_bytes = n_tokens * batch * shape.token_bytes
    fits = not on_gpu() or n_bytes + bench.dense.n_bytes + 2**31 <= torch.cuda.get_device_properties(0).total_memory
    whole = WholeCache(shape, bench.dense, n_tokens if fits else shape.page_size, batch)
    sides[NO_ATTENTION] = recorded(whole.step_without_attention)
    if fits:
        sides[WHOLE] = recorded(whole.step)
    else:
        bench.notes.append(f"{WHOLE} at {n_tokens} tokens, batch {batch}: {n_bytes / 2**30:.0f} GiB do not fit")
    timings = times(sides, rounds=shape.rounds)
    return [
        _row(n_tokens, batch, name, timings, device_kv_gib=0.0 if name == NO_ATTENTION else n_bytes / 2**30) for name in sides
    ]


def _recall_rows(sequences: Sequences, steps: Mapping[str, Step], corrections: Corrections) -> list[Row]:
    """Streamed sides in turns, then synchronous retrieval, which chooses nothing ahead."""
    shape, rows = sequences.shape, []
    sequences.turn(corrections)
    base = None
    for names in ([side.name for side in STREAMED], [SYNCHRONOUS.name]):
        steps[names[0]]()  # pages chosen ahead, if any, belong to another turn
        before = sequences.n_moved
        timings = times({name: steps[name] for name in names}, rounds=shape.rounds)
        n_steps = len(names) * (shape.rounds + (WARMUP if on_gpu() else 0))
        at_once, ahead = ((sequences.n_moved - before) / n_steps / shape.n_layers / sequences.batch).tolist()
        base = base or timings.row(OURS.name)["median_ms"]
        # The planned rate holds for the policy's own threshold: the checks compare them.
        corrected = steps[OURS.name].corrected
        for name in names:
            row = _row(sequences.n_tokens, sequences.batch, name, timings, device_kv_gib=_device_gib(sequences), base=base)
            is_streamed = name != SYNCHRONOUS.name
            rows.append(
                row
                | {
                    "rate": corrections.layer_steps,
                    "rate_of_heads": corrections.heads,
                    "corrected_layer_steps": round(float(corrected.any(2).float().mean()), 3) if is_streamed else None,
                    "corrected_heads": round(float(corrected.float().mean()), 3) if is_streamed else None,
                    "layers_with_any": round(float(corrected.flatten(1).any(1).float().mean()), 3) if is_streamed else None,
                    "page_heads_at_once": round(at_once, 1),
                    "page_heads_ahead": round(ahead, 1),
                    "mib_per_step": round(
                        (at_once + ahead) * shape.n_layers * sequences.batch * shape.page_head_bytes / 2**20, 1
                    ),
                }
            )
    return rows


def _row(n_tokens: int, batch: int, side: str, timings: Timings, *, device_kv_gib: float, base: float | None = None) -> Row:
    """Columns of every side. ``over_ours``: at the same rate."""
    row = timings.row(side)
    missing = ("corrected_layer_steps", "corrected_heads", "layers_with_any", "page_heads_at_once", "page_heads_ahead")
    return {
        "tokens": n_tokens,
        "batch": batch,
        "side": side,
        "rate": None,
        "rate_of_heads": None,
        **row,
        "over_ours": None if base is None else round(row["median_ms"] / base, 2),
        "tokens_per_s": round(1e3 * batch / row["median_ms"], 1),
        **dict.fromkeys((*missing, "mib_per_step")),
        "device_kv_gib": round(device_kv_gib, 2),
    }


def _device_gib(sequences: Sequences) -> float:
    """Bytes of working sets, and of summaries as if no two sequences or layers shared a page."""
    shape, sets = sequences.shape, sequences.recall.sets
    n_layers = shape.n_layers * sequences.batch
    summaries = sequences.values["page_table"].numel() * sets.tensors.summaries[0].nbytes
    return (n_layers * sets.sizes.n_pages * sets.tensors.kv[0].nbytes + summaries) / 2**30


def _timeline(bench: Bench, hidden: list[Row]) -> dict[str, Any]:
    """Profile two steps at 32k tokens, batch 1, half of the layer-steps corrected."""
    n_tokens = COMBINATIONS[0][0]
    wake_profiler()
    sequences = bench.sequences(n_tokens, 1, 1)
    for side in (OURS, LAUNCHED):
        step = Step(sequences, side)
        sequences.turn(PICTURED)
        step()
        profiled = profiled_steps(step, 2)
        if profiled and tells_streams_apart(profiled[-1]):
            break
        bench.notes.append(f"timeline of {side.name}: the profiler does not tell the streams apart")
    else:
        return {}
    hidden += [{"side": side.name, "step": i, **hidden_work(events)} for i, events in enumerate(profiled)]
    bench.say(f"profiled: {hidden[-1]}")
    share = f"{PICTURED.layer_steps:.0%} of layer-steps corrected"
    return {"title": f"{side.name}: {n_tokens} tokens on the host, batch 1, {share}", "events": to_json(profiled[-1])}
