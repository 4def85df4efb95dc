"""From a model's name to its results file and page: what ``python -m benchmarks.quality --model NAME`` does."""

import dataclasses
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from benchmarks.quality.machine import these_versions, this_machine
from benchmarks.quality.real.answering import Answerer
from benchmarks.quality.real.asking import Asker
from benchmarks.quality.real.calibrating import Calibration, recipes_for
from benchmarks.quality.real.clock import Clock
from benchmarks.quality.real.contenders import contenders
from benchmarks.quality.real.extras import measured_talks, measured_texts
from benchmarks.quality.real.families import Family, families, synthetic_families
from benchmarks.quality.real.known import Known
from benchmarks.quality.real.measure import FOR_TEXTS, TALKS, TEXTS, Measurer, parts_of
from benchmarks.quality.real.results import RealResults
from benchmarks.quality.real.settings import RealSettings
from benchmarks.quality.results import ModelFacts
from benchmarks.quality.store import Store
from trt_kv.errors import UsageError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.pipeline import BuildRequest, ModelSource, build_engine
from trt_kv.pipeline.plans import WeightPlan
from trt_kv.policies import policy_from_name
from trt_kv.presets import preset
from trt_kv.recipe import RecipeModel
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.engine import Engine

Tell = Callable[[str], None]
QUANT = "int4"


def measured_model(
    model: str,
    settings: RealSettings,
    folder: Path,
    *,
    minutes: float | None,
    command: Sequence[str],
    tell: Tell,
    known: RealResults | None = None,
    only: Collection[str] = (),
) -> RealResults:
    """The results of the preset ``model``, on an engine with weights of 4 bits that is built in ``folder`` once.

    Parts are kept in ``folder`` too. After ``minutes`` nothing more is measured, and the results have what there is. What
    ``known`` has is not measured again. Nothing but the parts ``only`` (``parts_of``) is measured, if there are any.
    """
    clock = Clock(minutes=minutes)
    checkpoint = open_checkpoint(preset(model).checkpoint())
    engine = build_engine(
        BuildRequest(
            source=ModelSource(model=model),
            policy=policy_from_name("full"),
            out=folder / "engine",
            weights=WeightPlan(quant=QUANT),
        ),
        on_note=tell,
    )
    return results_of_engine(
        checkpoint,
        engine,
        families() if model != "llama3" else synthetic_families(),
        settings,
        folder=folder / "parts",
        clock=clock,
        command=shlex.join(command),
        tell=tell,
        known=known,
        only=only,
    )


def results_of_engine(
    checkpoint: Checkpoint,
    folder_of_engine: Path,
    of_families: Sequence[Family],
    settings: RealSettings,
    *,
    folder: Path,
    clock: Clock,
    command: str,
    tell: Tell,
    known: RealResults | None = None,
    only: Collection[str] = (),
) -> RealResults:
    """The same on a built engine, whatever its policy."""
    if unknown := set(only) - set(parts_of(settings)):
        raise UsageError("the report has no such part", got=sorted(unknown), expected=f"of {', '.join(parts_of(settings))}")
    with Engine.load(folder_of_engine, prefix_cache=False, cache_tokens=64) as engine:
        steps, config = engine.runner._executor, engine.manifest.config
        assert isinstance(steps, SplitStepExecutor)
        versions = these_versions(steps.description)
        model = RecipeModel(name=checkpoint.name, digest=checkpoint.digest, n_layers=config.n_layers)
        store = Store(folder=folder, conditions={"model": model.digest, "versions": dataclasses.asdict(versions)})
        asker = Asker(engine.tokenizer, config.eos_token_ids)
        longest = max(plan.n_tokens for plan in settings.lengths) + settings.text_tokens
        answerer = Answerer(steps.dense, config, longest=longest)
        compared = contenders()
        earlier = Known.nothing()
        if known is not None:
            earlier = Known.of(known, digest=model.digest, versions=versions, settings=settings)
        calibration = Calibration(
            checkpoint=checkpoint, answerer=answerer, model=model, store=store, known=earlier.recipes, tell=tell
        )
        recipes = recipes_for([one.policy for one in compared], settings, calibration)
        measurer = Measurer(
            answerer=answerer,
            asker=asker,
            settings=settings,
            known=compared,
            recipes=recipes,
            store=store,
            clock=clock,
            out_of_time=clock.until(1.0),
            tell=tell,
            earlier=earlier,
            only=frozenset(only),
        )
        marked = measurer.cells(of_families)
        return RealResults(
            command=command,
            machine=this_machine(),
            versions=versions,
            settings=settings,
            model=ModelFacts.of(checkpoint),
            weights=QUANT,
            page_size=answerer.harness.pool.page_size,
            page_bytes=answerer.harness.pool.page_bytes,
            recipes=recipes.facts,
            policies=tuple(contender.facts for contender in compared),
            families=tuple(family.facts for family in of_families),
            tried=marked.tried,
            cells=marked.compared,
            texts=measured_texts(measurer.within(FOR_TEXTS, TEXTS)),
            talks=measured_talks(measurer.within(1.0, TALKS), steps.dense, config),
        )
