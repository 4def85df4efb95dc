"""The engine core (continuous batching) compared with static batching: throughput and latencies, cost of planning, effect of a
long prompt on decoding sequences, and whether a chunk and a decode batch should be one step.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import Check, Report, Row, Target
from benchmarks.models import FULL, PREFIXKV, Shape, calibrated_shares, exported_model, random_checkpoint
from benchmarks.serving import arrivals, long_prompt, mixed_step, planning
from benchmarks.serving.arrivals import SATURATING, Setting, Traffic
from benchmarks.serving.sides import ServedModel
from benchmarks.serving.traffic import Lengths, Mix
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.policy import Policy
from trt_kv.presets import preset

KEPT = 0.3
PICTURE = "serving_long_prompt.png"
IMAGES = Path(__file__).parents[2] / "docs" / "images"
PROMPTS = Lengths(median=96, sigma=0.7, least=16, most=512)
LONG = Mix(name="long answers", prompt=PROMPTS, answer=Lengths(median=48, sigma=0.9, least=4, most=256))
SHORT = Mix(name="short answers", prompt=PROMPTS, answer=Lengths(median=8, sigma=0.7, least=2, most=48))
WIDE_MIX = Mix(
    name="long answers",
    prompt=Lengths(median=48, sigma=0.7, least=16, most=160),
    answer=Lengths(median=24, sigma=0.9, least=4, most=96),
)
"""Shorter requests, since a token of this shape takes thirty times as long."""
CAREFUL, SMALL, USUAL_SETTING, EAGER = (
    Setting(max_sequences=8, chunk=16),
    Setting(max_sequences=8, chunk=64),
    Setting(max_sequences=32, chunk=64),
    Setting(max_sequences=32, chunk=256),
)
PLANNING_PERCENT = 2.0
CHUNK_SHARE = 1.1
"""Limit: during a prefill a decode step waits for one chunk, plus a tenth for noise."""
WIDE = Shape(n_layers=2, hidden_size=2048, n_heads=32, n_kv_heads=8, head_dim=64, intermediate_size=8192)
"""As wide as Llama 3.2 1B, with fewer layers: sixteen of them would take eight times as long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """Amount of measurements; ``light`` is a load measured in addition to a saturating one."""

    seeds: tuple[int, ...] = (0, 1, 2)
    wide_seeds: tuple[int, ...] = (0, 1)
    n_requests: int = 96
    n_light_requests: int = 48
    n_wide_requests: int = 24
    n_wide_light_requests: int = 16
    light: tuple[float, ...] = (0.8, 0.5)
    wide_light: tuple[float, ...] = (0.7,)
    planning_steps: int = 60
    planning_rounds: int = 3
    long_prompt: int = 1024
    chunks: tuple[int, ...] = (64, 128, 512)
    steps_around: int = 20
    long_prompt_rounds: int = 2
    mixed_sizes: tuple[tuple[int, int], ...] = ((16, 8), (64, 8), (64, 32), (512, 8))
    mixed_rounds: int = 7
    wide: Shape = WIDE


QUICK = Effort(
    seeds=(0,),
    wide_seeds=(0,),
    n_requests=8,
    n_light_requests=4,
    n_wide_requests=4,
    n_wide_light_requests=4,
    light=(2.0,),
    wide_light=(2.0,),
    planning_steps=4,
    planning_rounds=2,
    long_prompt=96,
    chunks=(16, 48),
    steps_around=4,
    mixed_sizes=((16, 3),),
    mixed_rounds=2,
    wide=Shape(n_layers=2, hidden_size=128, n_heads=8, n_kv_heads=2, head_dim=16, intermediate_size=256),
)


def run(folder: Path, *, quick: bool) -> Report:
    """The bundled model, whole and under PrefixKV, and layers of Llama 3.2 1B's shape; the picture goes to the documents, with
    ``quick`` to ``folder``.
    """
    effort = QUICK if quick else Effort()
    models = _models(folder, effort)
    checks, tables, targets = _arrivals(models, effort)
    bundled, wide = models["bundled, full"], models[_wide_name(effort)]
    costs = [
        {"model": name, **planning.measure(model, n_steps=effort.planning_steps, rounds=effort.planning_rounds)}
        for name, model in (("bundled", bundled), (_wide_name(effort), wide))
    ]
    targets += [
        Target(
            what=f"percent of a decode step of {row['sequences']} sequences that is planning, {row['model']}",
            measured=row["planning_percent"],
            limit=PLANNING_PERCENT,
        )
        for row in costs
    ]
    gaps, drawn = long_prompt.measure(
        wide, effort.chunks, n_prompt=effort.long_prompt, n_around=effort.steps_around, rounds=effort.long_prompt_rounds
    )
    targets += [
        Target(
            what=f"lengthening of the time between tokens, in chunks of {row['chunk_tokens']} tokens",
            measured=row["lengthening_per_chunk"],
            limit=CHUNK_SHARE,
        )
        for row in gaps
    ]
    long_prompt.draw(
        drawn,
        (folder if quick else IMAGES) / PICTURE,
        title=f"{_wide_name(effort)}: a prompt of {effort.long_prompt} tokens arrives while 8 sequences decode",
    )
    mixed, mixed_checks = mixed_step.measure(wide.executor, wide.config, effort.mixed_sizes, rounds=effort.mixed_rounds)
    return Report(
        title="Serving: the core beside static groups, and what its steps cost",
        settings={"effort": dataclasses.asdict(effort), "mixes": [dataclasses.asdict(mix) for mix in (LONG, SHORT, WIDE_MIX)]}
        | {"picture": PICTURE},
        checks=[*checks, *mixed_checks],
        tables={
            **tables,
            "Planning, ms per decode step": costs,
            f"{_wide_name(effort)}: ms between tokens around a prompt of {effort.long_prompt} tokens": gaps,
            f"{_wide_name(effort)}: dense parts of a chunk and a decode batch, ms": mixed,
        },
        targets=targets,
    )


def _wide_name(effort: Effort) -> str:
    return f"{effort.wide.n_layers} layers as in Llama 3.2 1B, full"


def _models(folder: Path, effort: Effort) -> dict[str, ServedModel]:
    """By name. The bundled model's recipe is calibrated here."""
    checkpoint = open_checkpoint(preset("llama3").bundled_folder)
    bundled = exported_model(checkpoint, folder / "bundled")
    wide = exported_model(random_checkpoint(effort.wide, folder / "wide"), folder / "wide-graphs")
    of_bundled: Mapping[str, Any] = {"executor": bundled.executor(), "config": bundled.config}
    shares = calibrated_shares(checkpoint, bundled, of_bundled["executor"], budgets=[KEPT])[KEPT]
    return {
        "bundled, full": ServedModel(**of_bundled, policy=FULL),
        f"bundled, prefixkv_paper {KEPT:.0%}": ServedModel(**of_bundled, policy=PREFIXKV, kept_shares=shares),
        _wide_name(effort): ServedModel(executor=wide.executor(), config=wide.config, policy=FULL),
    }


def _arrivals(models: Mapping[str, ServedModel], effort: Effort) -> tuple[list[Check], dict[str, list[Row]], list[Target]]:
    checks: list[Check] = []
    tables: dict[str, list[Row]] = {}
    targets: list[Target] = []
    for name, model in models.items():
        traffics = _wide_traffics(effort) if name == _wide_name(effort) else _bundled_traffics(effort, model.policy)
        if name != _wide_name(effort):
            checks.append(arrivals.check_same_tokens(name, model, USUAL_SETTING, LONG))
        rows = arrivals.measure(model, traffics)
        tables[f"{name}: Poisson arrivals"] = rows
        targets += arrivals.targets(name, rows)
    return checks, tables, targets


def _bundled_traffics(effort: Effort, policy: Policy) -> list[Traffic]:
    """Short answers only with the whole cache: they are mostly prefill, which eviction does not shorten."""
    settings = (CAREFUL, SMALL, USUAL_SETTING, EAGER)
    many, few = effort.n_requests, effort.n_light_requests
    return [
        Traffic(mix=LONG, n=many, loads=(SATURATING,), seeds=effort.seeds, settings=settings),
        *([Traffic(mix=SHORT, n=many, loads=(SATURATING,), seeds=effort.seeds, settings=settings)] if policy == FULL else []),
        Traffic(mix=LONG, n=few, loads=effort.light, seeds=effort.seeds, settings=(USUAL_SETTING,)),
    ]


def _wide_traffics(effort: Effort) -> list[Traffic]:
    n, few, seeds = effort.n_wide_requests, effort.n_wide_light_requests, effort.wide_seeds
    return [
        Traffic(mix=WIDE_MIX, n=n, loads=(SATURATING,), seeds=seeds, settings=(USUAL_SETTING, EAGER)),
        Traffic(mix=WIDE_MIX, n=few, loads=effort.wide_light, seeds=seeds[:1], settings=(USUAL_SETTING,)),
    ]
