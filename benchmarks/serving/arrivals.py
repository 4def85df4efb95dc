"""Poisson arrivals: throughput and latencies of the engine core compared with static batching."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.harness import Check, Row, Target, check_close, rounded
from benchmarks.serving.sides import GROUP, ServedModel, serve_continuously, serve_in_groups
from benchmarks.serving.traffic import Arrival, Mix, Served, poisson

SATURATING = 16.0
"""Saturating arrival rate, relative to the throughput of static groups that are never idle: more than any side can serve."""
STATIC = f"static groups of {GROUP}"
WANTED = 2.0
"""Target throughput relative to static groups, at a 95th percentile between tokens that is not longer."""
Serve = Callable[[Sequence[Arrival]], Served]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sequences that a core runs concurrently, and prompt tokens that it reads between two decode steps."""

    max_sequences: int
    chunk: int

    @property
    def name(self) -> str:
        return f"core, {self.max_sequences} sequences, chunk {self.chunk}"


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The workload: ``n`` requests of a mix for each seed and load, served by static groups and by a core of each setting."""

    mix: Mix
    n: int
    loads: Sequence[float]
    seeds: Sequence[int]
    settings: Sequence[Setting]


def check_same_tokens(name: str, model: ServedModel, setting: Setting, mix: Mix) -> Check:
    """Check that both sides generate the same tokens for the same requests with the same prompt chunks."""
    arrivals = poisson(mix, 2 * GROUP, per_second=np.inf, vocab_size=model.config.vocab_size, seed=99)
    core = model.core(max_sequences=setting.max_sequences, chunk=setting.chunk)
    sides = (serve_in_groups(model.runner(setting.chunk), arrivals), serve_continuously(core, arrivals))
    ours, theirs = (np.concatenate([request.token_ids for request in side.requests]) for side in sides)
    return check_close(f"tokens of {name}, both sides", ours, theirs, within=0.0)


def measure(model: ServedModel, traffics: Sequence[Traffic]) -> list[Row]:
    """Rows of every mix, load and side: medians over the seeds, ratios of the same seed's runs. Sides take turns."""
    settings = dict.fromkeys(setting for traffic in traffics for setting in traffic.settings)
    groups = functools.partial(serve_in_groups, model.runner())
    cores = {setting: model.core(max_sequences=setting.max_sequences, chunk=setting.chunk) for setting in settings}
    rows = []
    for traffic in traffics:
        sides: dict[str, Serve] = {STATIC: groups}
        sides |= {setting.name: functools.partial(serve_continuously, cores[setting]) for setting in traffic.settings}
        capacity = _capacity(model, traffic, sides)
        for load in traffic.loads:
            found = _at_load(model, traffic, sides, load * capacity)
            rows += [
                {"mix": traffic.mix.name, "load": load, "side": name, **_summary(found[name], found[STATIC])} for name in sides
            ]
    return rows


def _capacity(model: ServedModel, traffic: Traffic, sides: Mapping[str, Serve]) -> float:
    """Requests per second of static groups that are never idle; every side runs once before it is measured."""
    arrivals = poisson(traffic.mix, traffic.n, per_second=np.inf, vocab_size=model.config.vocab_size, seed=98)
    for serve in sides.values():
        serve(arrivals[: GROUP // 2])
    served = sides[STATIC](arrivals)
    return len(served.requests) / served.makespan_s


def _at_load(
    model: ServedModel, traffic: Traffic, sides: Mapping[str, Serve], per_second: float
) -> Mapping[str, list[Mapping[str, float]]]:
    """The measurements of each side, by seed."""
    names = list(sides)
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in names}
    for turn, seed in enumerate(traffic.seeds):
        first = turn % len(names)
        arrivals = poisson(traffic.mix, traffic.n, per_second=per_second, vocab_size=model.config.vocab_size, seed=seed)
        for name in names[first:] + names[:first]:
            found[name].append(sides[name](arrivals).measures())
    return found


def _summary(ours: Sequence[Mapping[str, float]], static: Sequence[Mapping[str, float]]) -> Row:
    ratios = {
        measure: [a[measure] / b[measure] for a, b in zip(ours, static, strict=True)]
        for measure in ("tokens_per_s", "between_tokens_p95_ms")
    }
    return {
        "throughput_ratio": rounded(np.median(ratios["tokens_per_s"])),
        "throughput_ratio_of_seeds": _range(ratios["tokens_per_s"]),
        "between_tokens_p95_ratio": rounded(np.median(ratios["between_tokens_p95_ms"])),
        "between_tokens_p95_ratio_of_seeds": _range(ratios["between_tokens_p95_ms"]),
        **{measure: rounded(np.median([one[measure] for one in ours])) for measure in ours[0]},
    }


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.2f} .. {max(values):.2f}"


def targets(name: str, rows: Sequence[Row]) -> list[Target]:
    """The target under a saturating load, for the best setting: of those whose 95th percentile between tokens is at most the
    static side's, the one with the highest throughput; if there is none, the one with the lowest percentile.
    """
    found = []
    for mix in dict.fromkeys(row["mix"] for row in rows):
        cores = [row for row in rows if row["mix"] == mix and row["load"] == SATURATING and row["side"] != STATIC]
        best = min(cores, key=lambda r: (max(1.0, r["between_tokens_p95_ratio"]), -r["throughput_ratio"]))
        what = f"{name}, {mix}, {best['side']} beside {STATIC}"
        found += [
            Target(what=f"{what}: p95 between tokens", measured=best["between_tokens_p95_ratio"], limit=1.0),
            Target(what=f"{what}: time for the same tokens", measured=rounded(1 / best["throughput_ratio"]), limit=1 / WANTED),
        ]
    return found
