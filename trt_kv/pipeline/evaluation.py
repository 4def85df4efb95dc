"""Evaluates one or two engines on a file of tasks; the results file is updated as answers complete."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trt_kv.pipeline.answering import answers_to
from trt_kv.pipeline.callbacks import OnNote, OnProgress, ignore
from trt_kv.pipeline.destinations import check_new_file
from trt_kv.pipeline.evaluation_start import begin, earlier_of, joined
from trt_kv.pipeline.requests import EvaluationRequest

if TYPE_CHECKING:
    from trt_kv.calibration.answer_files import Evaluation, Run
    from trt_kv.calibration.answers import Answer
    from trt_kv.calibration.task_cases import TaskCase
    from trt_kv.runtime.engine import Engine

SAVE_EVERY_S = 5.0
"""Seconds between writes of the results file: a killed process loses at most these and the batch in progress."""


def evaluate(request: EvaluationRequest, *, on_progress: OnProgress = ignore, on_note: OnNote = ignore) -> "Evaluation":
    """Run the missing tasks of ``request`` and return the finished evaluation, which is also written to ``request.out``.

    Invalid requests are refused before an engine is opened. If it is interrupted, ``request.out`` keeps the answers so far.
    Raises ``UsageError`` and ``EngineError`` with what is wrong, ``ReportError`` for results that cannot be used.

    Example::

        from pathlib import Path

        from trt_kv.calibration.answer_files import summary_of
        from trt_kv.pipeline import EvaluationRequest, evaluate

        request = EvaluationRequest(engine=Path("engines/small"), tasks=Path("mine.jsonl"), against=Path("engines/full"))
        print(summary_of(evaluate(request))["overall"]["accuracy"])
    """
    from trt_kv.runtime.engine import Engine

    if request.out is not None:
        check_new_file(request.out, "--out")
    evaluation, cases = begin(request)
    earlier = earlier_of(request, evaluation)
    if earlier is not None:
        evaluation = joined(evaluation, earlier)
        n_there = sum(len(run.answers) for run in evaluation.runs)
        on_note(f"{request.out}: {n_there} of {len(evaluation.runs) * len(cases)} answers are already there")
    _say_what_tells_little(cases, on_note)
    any_recalls = any(run.engine.applied_policy.recalls for run in evaluation.runs)
    with _saved(request.out, evaluation, earlier, on_note) as keep:
        for index, folder in enumerate((request.engine, request.against)[: len(evaluation.runs)]):
            run = evaluation.runs[index]
            if folder is None or len(run.answers) == len(cases):
                continue
            batch = None if request.on.on_host else request.batch_size
            resources = request.resources.options(has_host_tier=run.engine.applied_policy.recalls or not any_recalls)
            digest = request.digest if index == 0 else None
            engine = Engine.load(folder, digest=digest, on_progress=on_progress, batch=batch, **request.on.options, **resources)
            keep(evaluation, at_once=True)
            for answers in _missing_answers(engine, run, cases, request, on_progress):
                evaluation = evaluation.with_answers(index, answers)
                keep(evaluation)
            del engine  # before the other one is opened: memory may not suffice for both
    return evaluation


def _say_what_tells_little(cases: list["TaskCase"], on_note: OnNote) -> None:
    lost = [case.task for case in cases if not case.can_come_out]
    if lost:
        on_note(
            f"note: the tokenizer cannot represent what {len(lost)} of {len(cases)} tasks expect, so they cannot be right "
            f"(the first: {lost[0].name})"
        )
    if all(len(case.expected) == 1 for case in cases):
        on_note(
            "note: every expected answer is one token, which is predicted before anything is evicted: perplexity and "
            "accuracy do not depend on the policy"
        )


@contextlib.contextmanager
def _saved(
    out: Path | None, evaluation: "Evaluation", there: "Evaluation | None", on_note: OnNote
) -> Iterator[Callable[..., None]]:
    """A function that saves an evaluation to ``out``: at once, some seconds later, or when the block ends, also on an
    exception.

    ``there`` is the evaluation in ``out``. Nothing is written before the first answer unless ``at_once`` is set.
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
            on_note(f"{out} keeps the answers so far; the same command continues")


def _missing_answers(
    engine: "Engine", run: "Run", cases: list["TaskCase"], request: EvaluationRequest, on_progress: OnProgress
) -> Iterator[list["Answer"]]:
    missing = cases[len(run.answers) :]
    n_there = sum(len(case.prompt) for case in cases[: len(run.answers)])
    total = sum(len(case.prompt) for case in cases)
    stage = f"evaluating {run.engine.name}"
    return answers_to(
        engine,
        missing,
        match=request.match,
        batch_size=request.batch_size,
        on_tokens=lambda done: on_progress(stage, n_there + done, total),
    )
