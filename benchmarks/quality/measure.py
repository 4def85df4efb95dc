"""Measures a quality report: recipes from the calibration split, the full cache on all tasks, then every policy on the tasks
that the model can do.

Each part is stored as soon as it is measured, so that an interrupted run can be resumed.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import Tokenizer

from benchmarks.quality.effort import Effort, OnProgress
from benchmarks.quality.harness import harness_from_engine
from benchmarks.quality.machine import these_versions, this_machine
from benchmarks.quality.measure_cells import CellMeasurer
from benchmarks.quality.policies import Contender, contenders
from benchmarks.quality.recipes import stored_recipes
from benchmarks.quality.results import ModelFacts, Results
from benchmarks.quality.settings import ContextPlan, Settings
from benchmarks.quality.store import Store
from benchmarks.quality.tasks import report_tasks
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.manifest import load_manifest
from trt_kv.recipe import RecipeModel


def measure(
    checkpoint: Checkpoint,
    engine: Path,
    settings: Settings,
    *,
    folder: Path,
    command: str,
    on_progress: OnProgress,
    tell: Callable[[str], None],
) -> Results:
    """Everything a report needs, on the graph segments of the built ``engine`` (any policy) of ``checkpoint``.

    Parts are kept in ``folder``. ``tell`` is called with a message about the expected duration.
    """
    manifest = load_manifest(engine)
    tokenizer = Tokenizer.from_file(str(engine / "tokenizer.json"))
    known, tasks = contenders(), report_tasks(settings)
    model = RecipeModel(name=checkpoint.name, digest=checkpoint.digest, n_layers=checkpoint.config.n_layers)
    harness = harness_from_engine(
        engine,
        manifest,
        context_length=max(plan.context_length for plan in settings.contexts),
        n_forks=_whole_forks(settings, known),
    )
    versions = these_versions(harness.steps.description)
    store = Store(folder=folder, conditions={"model": model.digest, "versions": dataclasses.asdict(versions)})

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    policies = [contender.policy for contender in known]
    recipes = stored_recipes(store, "recipes", harness, encode, settings, policies, model)
    cells = CellMeasurer(
        harness=harness,
        encode=encode,
        settings=settings,
        contenders=known,
        recipes=recipes,
        store=store,
        effort=Effort(on_progress),
    )
    places = [(task, plan.context_length) for plan in settings.contexts for task in tasks]
    if (minutes := cells.minutes_of(places)) > 0.0:
        tell(f"this takes about {minutes:.0f} minutes; it can be interrupted, and resumes where it stopped")
    capable = tuple(cells.capability(task, context_length) for task, context_length in places)
    results = Results(
        command=command,
        machine=this_machine(),
        versions=versions,
        settings=settings,
        model=ModelFacts.of(checkpoint),
        page_size=harness.pool.page_size,
        page_bytes=harness.pool.page_bytes,
        recipes=recipes.facts,
        policies=tuple(contender.facts for contender in known),
        tasks=tuple(task.facts for task in tasks),
        cells=capable,
    )
    compared = [
        cells.comparison(task, context_length, cell) if results.can(cell) else cell
        for (task, context_length), cell in zip(places, capable, strict=True)
    ]
    return dataclasses.replace(results, cells=tuple(compared))


def _whole_forks(settings: Settings, known: Sequence[Contender]) -> int:
    """Memory of all forks at any context, in whole sequences of the longest context, at most.

    A fork needs a whole sequence until it has evicted. Afterwards partly used pages and protected tokens add up to a tenth of
    the context.
    """
    longest = max(plan.context_length for plan in settings.contexts)

    def forks(plan: ContextPlan) -> float:
        measured = [contender for contender in known if contender.group in plan.groups]
        kept = [1.0 if contender.adaptive else sum(budget + 0.1 for budget in plan.budgets) for contender in measured]
        return (2.0 + sum(kept)) * plan.context_length / longest

    return math.ceil(max(map(forks, settings.contexts)))
