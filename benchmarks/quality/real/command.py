"""From a model's name to its results file and page: what ``python -m benchmarks.quality --model NAME`` does."""

import dataclasses
import shlex
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

from benchmarks.quality.machine import these_versions, this_machine
from benchmarks.quality.real.answering import Answerer
from benchmarks.quality.real.asking import Asker
from benchmarks.quality.real.clock import Clock
from benchmarks.quality.real.contenders import Contender, contenders
from benchmarks.quality.real.extras import measured_talks, measured_texts
from benchmarks.quality.real.families import Family, families, synthetic_families
from benchmarks.quality.real.measure import FOR_TEXTS, Measurer
from benchmarks.quality.real.results import RealResults
from benchmarks.quality.real.settings import RealSettings
from benchmarks.quality.recipes import Recipes, calibrated_head_recipes, calibrated_recipes
from benchmarks.quality.results import ModelFacts
from benchmarks.quality.store import Store
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.pipeline import BuildRequest, ModelSource, build_engine
from trt_kv.pipeline.calibration_heads import usefulness_of
from trt_kv.pipeline.calibration_prompts import calibration_prompts
from trt_kv.pipeline.plans import CalibrationPlan, WeightPlan
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.presets import preset
from trt_kv.recipe import RecipeModel
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.engine import Engine

Tell = Callable[[str], None]
QUANT = "int4"


def measured_model(
    model: str, settings: RealSettings, folder: Path, *, minutes: float | None, command: Sequence[str], tell: Tell
) -> RealResults:
    """The results of the preset ``model``, on an engine with weights of 4 bits that is built in ``folder`` once.

    Parts are kept in ``folder`` too. After ``minutes`` nothing more is measured, and the results have what there is.
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
    known = families() if model != "llama3" else synthetic_families()
    return results_of_engine(
        checkpoint,
        engine,
        known,
        settings,
        folder=folder / "parts",
        clock=clock,
        command=shlex.join(command),
        tell=tell,
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
) -> RealResults:
    """The same on a built engine, whatever its policy."""
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
        recipes = _recipes(store, answerer, checkpoint, settings, compared, model, tell)
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
            texts=measured_texts(measurer.within(FOR_TEXTS)),
            talks=measured_talks(measurer, steps.dense, config),
        )


def _recipes(
    store: Store,
    answerer: Answerer,
    checkpoint: Checkpoint,
    settings: RealSettings,
    compared: Sequence[Contender],
    model: RecipeModel,
    tell: Tell,
) -> Recipes:
    """As ``trt-kv build`` calibrates them, on its prompts, at every budget; those of layers and those of KV heads."""
    needing = [contender.policy for contender in compared if contender.policy.needs_recipe]
    of_heads = [policy for policy in needing if policy.heads == "own"]
    of_layers = [policy for policy in needing if policy.heads != "own"]
    budgets, seed = settings.budgets, settings.calibration_seed

    @cache
    def prompts() -> list[list[int]]:
        plan = CalibrationPlan(samples=settings.calibration_samples, seed=seed)
        return calibration_prompts(checkpoint, plan, settings.calibration_tokens, on_note=tell)

    def layers_calibrated() -> Recipes:
        return calibrated_recipes(answerer.harness, prompts(), budgets, of_layers, model, seed=seed)

    def heads_calibrated() -> Recipes:
        read = prompts()
        longest = max(map(len, read))
        use = partial(usefulness_of, checkpoint, max_tokens=longest)
        return calibrated_head_recipes(read, budgets, of_heads, use, model, seed=seed)

    def stored(name: str, calibrated: Callable[[], Recipes], policies: Sequence[Policy]) -> Recipes:
        calibration = [settings.calibration_samples, settings.calibration_tokens, seed]
        conditions = {"budgets": list(budgets), "calibration": calibration, "policies": sorted(map(repr, policies))}
        return store.get_or_measure(name, Recipes, calibrated, **conditions)

    layers = stored("recipes", layers_calibrated, of_layers)
    heads = stored("recipes-heads", heads_calibrated, of_heads)
    return Recipes(facts=(*layers.facts, *heads.facts))
