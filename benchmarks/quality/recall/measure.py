"""Measures host-resident policies on the documents of the main results; each cell is stored as soon as it is measured."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from benchmarks.quality.cases import Encode
from benchmarks.quality.effort import OnProgress
from benchmarks.quality.harness import harness_from_engine
from benchmarks.quality.machine import these_versions, this_machine
from benchmarks.quality.measure_cells import Entry, cases_of, documents_of, row_of, what_is_asked
from benchmarks.quality.policies import contenders
from benchmarks.quality.recall.harness import Moved, RecallHarness, recall_harness_from_engine
from benchmarks.quality.recall.policies import RECENT, SINKS, HostContender, host_contenders
from benchmarks.quality.recall.results import HostCell, HostPlan, MovedRow, RecallResults
from benchmarks.quality.recipes import Recipes, stored_recipes
from benchmarks.quality.settings import Settings
from benchmarks.quality.store import Store
from benchmarks.quality.tasks import ReportTask, report_tasks
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.manifest import load_manifest
from trt_kv.policy import Policy
from trt_kv.recipe import RecipeModel

ADAPTIVE = "freekv-unimetric"
DECODED_BEYOND = 64
"""Tokens of room for a fork beyond its context."""


def measure_recall(
    checkpoint: Checkpoint,
    engine: Path,
    settings: Settings,
    plans: Sequence[HostPlan],
    *,
    folder: Path,
    command: str,
    on_progress: OnProgress,
) -> RecallResults:
    """Every cell of ``plans``, on the graph segments of the built ``engine``; documents are those of ``settings``.

    Parts are kept in ``folder``.
    """
    manifest = load_manifest(engine)
    tokenizer = Tokenizer.from_file(str(engine / "tokenizer.json"))
    known, tasks = host_contenders(), {task.name: task for task in report_tasks(settings)}
    calibrating = harness_from_engine(engine, manifest, context_length=settings.calibration_context, n_forks=0)
    versions = these_versions(calibrating.steps.description)
    store = Store(folder=folder, conditions={"model": checkpoint.digest, "versions": dataclasses.asdict(versions)})

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    model = RecipeModel(name=checkpoint.name, digest=checkpoint.digest, n_layers=checkpoint.config.n_layers)
    with_recipes = [contender.recipe_policy for contender in known if contender.policy.needs_recipe]
    recipes = stored_recipes(store, "host-recipes", calibrating, encode, settings, with_recipes, model)
    cells: list[HostCell] = []
    n_cells = sum(len(plan.tasks) for plan in plans)
    for plan in plans:
        harness = recall_harness_from_engine(
            engine,
            manifest,
            _adaptive(known),
            page_size=plan.page_size,
            context_length=plan.context_length + DECODED_BEYOND,
            n_forks=len(entries(plan, known)),
        )
        for task in (tasks[name] for name in plan.tasks):
            cells.append(_cell(harness, task, plan, known, recipes, settings, encode, store))
            on_progress("measuring recalled pages", len(cells), n_cells)
    return RecallResults(
        command=command,
        machine=this_machine(),
        versions=versions,
        model_digest=checkpoint.digest,
        sinks=SINKS,
        recent=RECENT,
        plans=tuple(plans),
        recipes=recipes.facts,
        policies=tuple(contender.facts for contender in known),
        cells=tuple(cells),
    )


def entries(plan: HostPlan, known: Sequence[HostContender]) -> list[Entry]:
    """The rows of a plan's cells, the full cache first."""
    found = [Entry(contender=contenders()[0], budget=None)]
    for contender in known:
        if contender.group in plan.groups:
            budgets: Sequence[float | None] = [None] if contender.adaptive else plan.budgets_of(contender.group)
            found += [Entry(contender=contender, budget=budget) for budget in budgets]
    return found


def _adaptive(known: Sequence[HostContender]) -> Policy:
    return next(contender.policy for contender in known if contender.name == ADAPTIVE)


def _cell(
    harness: RecallHarness,
    task: ReportTask,
    plan: HostPlan,
    known: Sequence[HostContender],
    recipes: Recipes,
    settings: Settings,
    encode: Encode,
    store: Store,
) -> HostCell:
    rows = entries(plan, known)
    plans = [entry.plan(recipes, lots=0) for entry in rows]

    def measured() -> HostCell:
        start = time.perf_counter()
        cases = cases_of(task, settings, plan.context_length, encode)
        found = [harness.run(case, plans) for case in cases]
        outcomes = [[outcome for outcome, _ in of_case] for of_case in found]
        full = [of_case[0] for of_case in outcomes]
        return HostCell(
            task=task.name,
            context_length=plan.context_length,
            documents=documents_of(cases, settings, plan.context_length),
            sink_mass=(0.0,),
            rows=tuple(row_of(entry, cases, [of[i] for of in outcomes], full) for i, entry in enumerate(rows)),
            elapsed_s=round(time.perf_counter() - start, 1),
            page_size=plan.page_size,
            page_head_bytes=harness.page_head_bytes,
            moved=tuple(_moved_row([of_case[i][1] for of_case in found]) for i in range(1, len(rows))),
        )

    return store.get_or_measure(
        f"{plan.groups[0]}-{task.name}-{plan.context_length}-{plan.page_size}",
        HostCell,
        measured,
        policies=[[entry.contender.name, repr(of)] for entry, of in zip(rows, plans, strict=True)],
        page_size=plan.page_size,
        **what_is_asked(task, settings, plan.context_length),
    )


def _moved_row(found: Sequence[Moved]) -> MovedRow:
    def values(field: str) -> tuple[float, ...]:
        known = [getattr(of, field) for of in found if getattr(of, field) is not None]
        return tuple(round(value, 3) for value in known)

    def means(field: str) -> tuple[tuple[float, ...], ...]:
        mean_LK = np.mean([getattr(of, field) for of in found], axis=0).round(3)
        return tuple(tuple(heads) for heads in mean_LK.tolist())

    return MovedRow(
        cosine_LK=means("cosine_LK"),
        corrected_LK=means("corrected_LK"),
        corrected_heads=values("corrected_heads"),
        corrected_layer_steps=values("corrected_layer_steps"),
        ahead=values("ahead"),
        late=values("late"),
        overlap=values("overlap"),
    )
