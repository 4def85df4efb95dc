"""Wires an evaluation: the file of tasks, one engine or two, and the results file that grows with every batch."""

import contextlib
import dataclasses
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

import trt_kv
from trt_kv.calibration.task_files import Match, tasks_from_file
from trt_kv.cli.progress import OnProgress, progress_bars
from trt_kv.cli.termination import termination_unwinds
from trt_kv.errors import EngineError, ReportError, UsageError
from trt_kv.manifest import Manifest, digest_of, load_manifest
from trt_kv.pipeline.answering import answers_to
from trt_kv.pipeline.plans import DeviceChoice
from trt_kv.require import require
from trt_kv.runtime.devices import DENSE, device_from_name

if TYPE_CHECKING:
    from trt_kv.calibration.answer_files import EngineFacts, Evaluation, Run, Settings
    from trt_kv.calibration.answers import Answer
    from trt_kv.calibration.task_cases import TaskCase
    from trt_kv.runtime.engine import Engine

TOKENIZER_FILE = "tokenizer.json"
SAVE_EVERY_S = 5.0
"""Seconds of work that a killed process loses at most, beside the batch it was in."""


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """What ``trt-kv evaluate`` was asked for. ``against``: an engine, or the results file of one; ``limit``: first tasks."""

    engine: Path
    tasks: Path
    against: Path | None
    match: Match
    max_new_tokens: int | None
    separator: str
    batch_size: int
    limit: int | None
    out: Path | None
    force: bool
    on: DeviceChoice


def evaluate(plan: EvaluationPlan) -> "Evaluation":
    """Run what is missing of the plan and return the finished evaluation, which then also stands in ``plan.out``.

    Everything that can be refused is refused before an engine is opened. However it ends, ``plan.out`` keeps the answers that
    were there. Raises ``UsageError`` and ``EngineError`` with what is wrong, ``ReportError`` for results that cannot be used.
    """
    from trt_kv.runtime.engine import Engine

    evaluation, cases = _begin(plan)
    earlier = _earlier(plan, evaluation)
    if earlier is not None:
        evaluation = _joined(evaluation, earlier)
        n_there = sum(len(run.answers) for run in evaluation.runs)
        click.echo(f"{plan.out}: {n_there} of {len(evaluation.runs) * len(cases)} answers are there", err=True)
    _say_what_tells_little(cases)
    with termination_unwinds(), progress_bars() as on_progress, _saved(plan.out, evaluation, earlier) as keep:
        for index, folder in enumerate((plan.engine, plan.against)[: len(evaluation.runs)]):
            run = evaluation.runs[index]
            if folder is None or len(run.answers) == len(cases):
                continue
            batch = None if plan.on.on_host else plan.batch_size
            engine = Engine.load(folder, on_progress=on_progress, batch=batch, **plan.on.options)
            keep(evaluation, at_once=True)
            for answers in _missing_answers(engine, run, cases, plan, on_progress):
                evaluation = evaluation.with_answers(index, answers)
                keep(evaluation)
            del engine  # before the other one is opened: both may not fit into the memory
    return evaluation


def _begin(plan: EvaluationPlan) -> tuple["Evaluation", list["TaskCase"]]:
    """The evaluation before its first answer, and its cases."""
    from trt_kv.calibration.answer_files import Evaluation, Run, Settings
    from trt_kv.calibration.task_cases import CaseRules, cases_from_tasks
    from trt_kv.runtime.detokenizer import load_tokenizer

    device_from_name(plan.on.device)
    manifest = load_manifest(plan.engine)
    settings = Settings(
        tasks_digest=digest_of(plan.tasks),
        match=plan.match,
        max_new_tokens=plan.max_new_tokens,
        separator=plan.separator,
        trt_kv=trt_kv.__version__,
    )
    tasks = tasks_from_file(plan.tasks)[: plan.limit]
    facts = _engine_facts(plan.engine, manifest, plan.on)
    evaluation = Evaluation(
        tasks=plan.tasks.name,
        n_tasks=len(tasks),
        settings=settings,
        machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        run=Run(engine=facts),
        against=_other_run(plan, facts, settings, len(tasks)),
    )
    tokenizer = load_tokenizer(plan.engine / TOKENIZER_FILE, error=EngineError)
    rules = CaseRules(
        separator=plan.separator,
        contains=plan.match == "contains",
        max_new_tokens=plan.max_new_tokens,
        max_positions=manifest.config.max_positions,
        vocab_size=manifest.config.vocab_size,
    )
    return evaluation, cases_from_tasks(tasks, tokenizer, rules, source=plan.tasks)


def _engine_facts(folder: Path, manifest: Manifest, on: DeviceChoice) -> "EngineFacts":
    """Raises ``EngineError`` where loading the engine would, files' digests aside."""
    from trt_kv.calibration.answer_files import EngineFacts
    from trt_kv.runtime.applicable import check_applicable

    check_applicable(folder, manifest)
    if TOKENIZER_FILE not in manifest.files:
        raise EngineError(f"the engine {folder} has no tokenizer", expected=TOKENIZER_FILE, fix="build the engine again")
    library = "onnxruntime" if on.on_host else on.dense or DENSE[0]
    runs_on = manifest.plan.built_by if manifest.plan is not None else f"{library} {require(library).__version__}"
    return EngineFacts(
        name=folder.resolve().name,
        digest=manifest.to_json()["digest"],
        model_name=manifest.model_name,
        model_digest=manifest.model_digest,
        tokenizer_digest=manifest.files[TOKENIZER_FILE].digest,
        policy=manifest.policy,
        target=manifest.target,
        dtype=on.dtype or manifest.dtype,
        runs_on=runs_on if on.on_host else f"{runs_on} on {on.device}",
    )


def _other_run(plan: EvaluationPlan, facts: "EngineFacts", settings: "Settings", n_tasks: int) -> "Run | None":
    """The run to compare with: of an engine, still without answers, or the first run of a finished results file; or none."""
    from trt_kv.calibration.answer_files import Run

    path = plan.against
    if path is None:
        return None
    if path.is_file():
        run = _run_of_file(path, settings, n_tasks)
    else:
        run = Run(engine=_engine_facts(path, load_manifest(path), plan.on))
    for what, mine, theirs in (
        ("models", facts.model_digest, run.engine.model_digest),
        ("tokenizers", facts.tokenizer_digest, run.engine.tokenizer_digest),
    ):
        if mine != theirs:
            raise UsageError(
                f"the two engines have different {what}",
                got=f"{facts.name}: {facts.model_name}, {mine}; {run.engine.name}: {run.engine.model_name}, {theirs}",
                expected="one checkpoint, built with two policies",
                fix="build the other engine from the same checkpoint, e.g. with --policy full",
            )
    return run


def _run_of_file(path: Path, settings: "Settings", n_tasks: int) -> "Run":
    from trt_kv.calibration.answer_files import Evaluation

    found = Evaluation.load(path)
    _check_same_settings(path, found.settings, settings)
    if len(found.run.answers) < n_tasks:
        raise UsageError(
            f"{path} has not all the answers to compare with",
            got=len(found.run.answers),
            expected=n_tasks,
            fix="finish it first, or name its engine instead",
        )
    return dataclasses.replace(found.run, answers=found.run.answers[:n_tasks])


def _earlier(plan: EvaluationPlan, evaluation: "Evaluation") -> "Evaluation | None":
    """What stands at ``plan.out`` and is to be continued; ``UsageError`` where it is something else."""
    from trt_kv.calibration.answer_files import Evaluation

    if plan.out is None or not os.path.lexists(plan.out):
        return None
    try:
        earlier = Evaluation.load(plan.out)
    except ReportError as cause:
        raise UsageError(
            f"{plan.out} exists already and is no evaluation", got=cause.what, fix="choose another --out"
        ) from cause
    if plan.force:
        return None
    fix = "choose another --out, or --force to evaluate again"
    _check_same_settings(plan.out, earlier.settings, evaluation.settings, fix=fix)
    for name, before, now in (
        ("engine", earlier.run, evaluation.run),
        ("engine to compare with", earlier.against, evaluation.against),
    ):
        got, asked = ("none" if run is None else _told(run.engine) for run in (before, now))
        if before is not None and got != asked:
            raise UsageError(f"{plan.out} is about another {name}", got=got, expected=asked, fix=fix)
    if max(len(run.answers) for run in earlier.runs) > evaluation.n_tasks:
        raise UsageError(
            f"{plan.out} has more answers than are asked for",
            got=f"{earlier.n_tasks} tasks",
            expected=f"at most {evaluation.n_tasks}",
            fix=fix,
        )
    return earlier


def _told(facts: "EngineFacts") -> str:
    """An engine, as far as answers depend on it."""
    return f"{facts.digest}, {facts.dtype}, {facts.runs_on}"


def _check_same_settings(
    path: Path, found: "Settings", asked: "Settings", *, fix: str = "use the same tasks and options"
) -> None:
    names = [field.name for field in dataclasses.fields(asked)]
    different = [name for name in names if getattr(found, name) != getattr(asked, name)]
    if different:
        raise UsageError(
            f"{path} was made from other tasks or with other options",
            got=", ".join(f"{name} {getattr(found, name)!r}" for name in different),
            expected=", ".join(f"{name} {getattr(asked, name)!r}" for name in different),
            fix=fix,
        )


def _joined(evaluation: "Evaluation", earlier: "Evaluation") -> "Evaluation":
    """``evaluation`` with the answers that are there."""
    against = evaluation.against
    if against is not None and earlier.against is not None and len(earlier.against.answers) > len(against.answers):
        against = earlier.against
    return dataclasses.replace(evaluation, run=earlier.run, against=against)


def _say_what_tells_little(cases: list["TaskCase"]) -> None:
    lost = [case.task for case in cases if not case.can_come_out]
    if lost:
        click.echo(
            f"note: the tokenizer does not spell what {len(lost)} of {len(cases)} tasks expect, so they cannot be right "
            f"(the first: {lost[0].name})",
            err=True,
        )
    if all(len(case.expected) == 1 for case in cases):
        click.echo(
            "note: every expected answer is one token, which is predicted before anything is evicted: perplexity and "
            "accuracy say nothing about the policy",
            err=True,
        )


@contextlib.contextmanager
def _saved(out: Path | None, evaluation: "Evaluation", there: "Evaluation | None") -> Iterator[Callable[..., None]]:
    """A function that keeps an evaluation in ``out``: at once, some seconds later, or when the block ends, however it does.

    ``there`` is what stands in ``out``. Without an answer or a wish to write at once nothing is written.
    """
    newest, last = evaluation, time.monotonic()

    def write() -> None:
        nonlocal there, last
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            newest.save(out)
        there, last = newest, time.monotonic()

    def keep(now: "Evaluation", *, at_once: bool = False) -> None:
        nonlocal newest
        newest = now
        if at_once or time.monotonic() - last >= SAVE_EVERY_S:
            write()

    try:
        yield keep
    finally:
        has_answers = any(run.answers for run in newest.runs)
        if newest != there and has_answers:
            write()
        if out is not None and has_answers and not newest.is_finished:
            click.echo(f"{out} keeps the answers so far; the same command continues", err=True)


def _missing_answers(
    engine: "Engine", run: "Run", cases: list["TaskCase"], plan: EvaluationPlan, on_progress: OnProgress
) -> Iterator[list["Answer"]]:
    missing = cases[len(run.answers) :]
    n_there = sum(len(case.prompt) for case in cases[: len(run.answers)])
    total = sum(len(case.prompt) for case in cases)
    stage = f"evaluating {run.engine.name}"
    return answers_to(
        engine,
        missing,
        match=plan.match,
        batch_size=plan.batch_size,
        on_tokens=lambda done: on_progress(stage, n_there + done, total),
    )
