"""Measures a quality report: recipes from the calibration split, then every variant at every kept share on every task."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

import trt_kv
from benchmarks.report_harness import SCORED, Harness, Outcome, Plan, harness_from_engine
from trt_kv.calibration.evaluation import FULL, VARIANTS, Encode, Variant, case_from_task
from trt_kv.calibration.evaluation_results import (
    Document,
    Machine,
    ModelFacts,
    RecipeFacts,
    Results,
    Row,
    Settings,
    TaskResults,
    Versions,
)
from trt_kv.calibration.prefixkv import calibrate_prefixkv_budgets
from trt_kv.calibration.tasks import REGIONS, Task, calibration_prompts, evaluation_tasks, plain_text_tasks
from trt_kv.export.checkpoint import Checkpoint
from trt_kv.manifest import load_manifest
from trt_kv.recipe import Recipe, RecipeModel, RecipeScore

OnProgress = Callable[[str, int, int], None]

FULL_SETTINGS = Settings(
    budgets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    context_length=1024,
    text_answer_length=64,
    fact_counts=(4, 8, 16, 32),
    documents_per_cell=20,
    follow_up_documents_per_cell=10,
    text_documents=40,
    calibration_samples=10,
    calibration_seed=0,
    evaluation_seed=0,
    window=32,
)
QUICK_SETTINGS = Settings(
    budgets=(0.2, 0.5),
    context_length=384,
    text_answer_length=16,
    fact_counts=(4, 16),
    documents_per_cell=2,
    follow_up_documents_per_cell=1,
    text_documents=3,
    calibration_samples=2,
    calibration_seed=0,
    evaluation_seed=0,
    window=32,
)


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """A task of the report: its documents, with the third of the document that each asked fact stands in."""

    name: str
    title: str
    description: str
    tasks: tuple[Task, ...]
    regions: tuple[str | None, ...]
    question_known: bool = True


def task_plans(settings: Settings) -> list[TaskPlan]:
    """The report's tasks. Every cell (number of facts, third of the document) has a seed of its own."""
    cells = [(n_facts, region) for n_facts in settings.fact_counts for region in REGIONS]
    asked = [
        (task, region)
        for cell, (n_facts, region) in enumerate(cells)
        for task in evaluation_tasks(
            settings.documents_per_cell,
            context_length=settings.context_length,
            n_facts=n_facts,
            distance=region,
            seed=settings.evaluation_seed + cell,
        )
    ]
    followed = [(task, region) for task, region in asked if task.index < settings.follow_up_documents_per_cell]
    text = plain_text_tasks(
        settings.text_documents,
        context_length=settings.context_length,
        answer_length=settings.text_answer_length,
        seed=settings.evaluation_seed,
    )
    return [
        TaskPlan(
            name="late_question",
            title="Late question",
            description="the question stands at the end of the prompt, so it is known when tokens are evicted",
            tasks=tuple(task for task, _ in asked),
            regions=tuple(region for _, region in asked),
        ),
        TaskPlan(
            name="follow_up",
            title="Question after eviction",
            description="the same documents, but the question comes only after tokens have been evicted",
            tasks=tuple(task for task, _ in followed),
            regions=tuple(region for _, region in followed),
            question_known=False,
        ),
        TaskPlan(
            name="plain_text",
            title="Plain text",
            description="more text after text without facts",
            tasks=tuple(text),
            regions=(None,) * len(text),
        ),
    ]


def measure(checkpoint: Checkpoint, engine: Path, settings: Settings, command: str, on_progress: OnProgress) -> Results:
    """Everything a report needs, on the dense pieces of the built ``engine`` (any policy) of ``checkpoint``."""
    manifest = load_manifest(engine)
    tokenizer = Tokenizer.from_file(str(engine / "tokenizer.json"))

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text).ids)

    n_forks = 1 + len(VARIANTS) * len(settings.budgets)
    harness = harness_from_engine(
        engine, manifest, window=settings.window, context_length=settings.context_length, n_forks=n_forks
    )
    model = RecipeModel(name=checkpoint.name, digest=checkpoint.digest, n_layers=checkpoint.config.n_layers)
    recipes = calibrate(harness, encode, settings, model, on_progress)
    return Results(
        command=command,
        machine=Machine(cpu=_cpu_name(), n_cores=os.cpu_count() or 1, system=f"{platform.system()} {platform.machine()}"),
        versions=Versions(
            trt_kv=trt_kv.__version__,
            python=platform.python_version(),
            numpy=np.__version__,
            torch=torch.__version__,
            executor=harness.executor.description,
        ),
        settings=settings,
        model=ModelFacts(
            name=model.name,
            digest=model.digest,
            n_layers=model.n_layers,
            n_parameters=sum(checkpoint.tensor(name).numel() for name in checkpoint.tensor_names),
        ),
        page_size=harness.pool.page_size,
        page_bytes=harness.pool.page_bytes,
        recipes=tuple(
            RecipeFacts(score=recipe.score.name, budget=recipe.budget, kept=recipe.kept, mass=recipe.mass or 0.0)
            for by_score in recipes.values()
            for recipe in by_score.values()
        ),
        tasks=tuple(measure_task(harness, plan, encode, recipes, on_progress) for plan in task_plans(settings)),
    )


def calibrate(
    harness: Harness, encode: Encode, settings: Settings, model: RecipeModel, on_progress: OnProgress
) -> dict[float, dict[str, Recipe]]:
    """Recipes by budget and score, found by the product's calibration on its calibration split."""
    prompts = calibration_prompts(
        settings.calibration_samples, context_length=settings.context_length, seed=settings.calibration_seed
    )
    recipes: dict[float, dict[str, Recipe]] = {budget: {} for budget in settings.budgets}
    for score in SCORED:
        found = calibrate_prefixkv_budgets(
            [encode(task.prompt) for task in prompts],
            harness.runners[score].importance,
            budgets=settings.budgets,
            score=RecipeScore(name=score, window=settings.window if score == "window" else None),
            model=model,
            source="bundled synthetic English, calibration split",
            seed=settings.calibration_seed,
            on_sample=lambda done, total, score=score: on_progress(f"calibrating ({score})", done, total),  # type: ignore[misc]
        )
        for recipe in found:
            recipes[recipe.budget][score] = recipe
    return recipes


def measure_task(
    harness: Harness, plan: TaskPlan, encode: Encode, recipes: Mapping[float, Mapping[str, Recipe]], on_progress: OnProgress
) -> TaskResults:
    """One row per variant and kept share (the full cache has one row) over all documents of a task."""
    cases = [case_from_task(task, encode, question_known=plan.question_known) for task in plan.tasks]
    plans = [Plan(variant=FULL, share=1.0, recipes={})]
    plans += [Plan(variant=v, share=share, recipes=by_score) for v in VARIANTS for share, by_score in recipes.items()]
    outcomes = []
    for done, case in enumerate(cases):
        on_progress(plan.title.lower(), done, len(cases))
        outcomes.append(harness.run(case, plans, seed=done))
    on_progress(plan.title.lower(), len(cases), len(cases))
    return TaskResults(
        name=plan.name,
        title=plan.title,
        description=plan.description,
        documents=tuple(
            Document(
                n_prompt_tokens=len(case.prompt),
                n_counted_tokens=len(case.fed) - case.first_counted,
                n_facts=task.n_facts,
                region=region,
            )
            for task, case, region in zip(plan.tasks, cases, plan.regions, strict=True)
        ),
        rows=tuple(
            _row(variant_plan.variant, variant_plan.share, [by_plan[i] for by_plan in outcomes])
            for i, variant_plan in enumerate(plans)
        ),
    )


def _row(variant: Variant, share: float, outcomes: Sequence[Outcome]) -> Row:
    return Row(
        variant=variant.name,
        budget=share,
        right="".join("1" if outcome.right else "0" for outcome in outcomes),
        losses=tuple(float(f"{outcome.loss:.5g}") for outcome in outcomes),
        kept_tokens=round(float(np.mean([outcome.kept_tokens for outcome in outcomes])), 2),
        kv_bytes=round(float(np.mean([outcome.kv_bytes for outcome in outcomes])), 1),
        kept_by_layer=tuple(np.mean([outcome.kept_by_layer for outcome in outcomes], axis=0).round(5).tolist()),
        kept_place=round(float(np.mean([outcome.kept_place for outcome in outcomes])), 4),
        fact_kept=_mean_known([outcome.fact_kept for outcome in outcomes]),
        question_kept=_mean_known([outcome.question_kept for outcome in outcomes]),
    )


def _mean_known(shares: Sequence[float | None]) -> float | None:
    known = [share for share in shares if share is not None]
    return round(float(np.mean(known)), 4) if known else None


def _cpu_name() -> str:
    """The CPU's model name where Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
