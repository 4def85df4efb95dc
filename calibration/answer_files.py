"""The results file of an evaluation: every answer, and, when all are present, their statistics.

It is written while the evaluation runs, so that an interrupted evaluation can continue.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kv.calibration.answers import Answer, comparison_of, groups_of, score_of
from trt_kv.errors import ReportError
from trt_kv.json_file import dataclass_from_json, read_json, write_atomically
from trt_kv.policy import Policy

FORMAT = "trt-kv-evaluation"
VERSION = 2
_DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings of an evaluation that its answers and their correctness depend on.

    ``max_new_tokens``: None for as many as the longest accepted answer needs. ``separator`` is put between a prompt and an
    answer if neither has white space there.
    """

    tasks_digest: str
    match: str
    max_new_tokens: int | None
    separator: str
    trt_kv: str


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """An engine: its folder's name, the digest of its manifest (which contains those of all files), its model and policy.

    ``windows``: each layer's attention window in tokens, 0 for none; empty: no layer has one. ``heads_apart``: layers of the
    cache per layer of the model (``trt_kv/cache_layers.py``).
    """

    name: str
    digest: str
    model_name: str
    model_digest: str
    tokenizer_digest: str
    policy: Policy
    target: str
    dtype: str
    runs_on: str
    windows: tuple[int, ...] = ()
    heads_apart: int = 1

    @property
    def applied_policy(self) -> Policy:
        """What the policy decides in this model."""
        return self.policy.applied_to(self.windows)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The answers of one engine to the first tasks of the file, in order."""

    engine: EngineFacts
    answers: tuple[Answer, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """State of an evaluation. ``n_tasks``: number of tasks used of the file ``tasks``; ``machine``: what it ran on."""

    tasks: str
    n_tasks: int
    settings: Settings
    machine: str
    run: Run
    against: Run | None

    def __post_init__(self) -> None:
        for run in self.runs:
            if len(run.answers) > self.n_tasks:
                raise ReportError(
                    "an evaluation has more answers than tasks", got=len(run.answers), expected=f"at most {self.n_tasks}"
                )

    @property
    def runs(self) -> list[Run]:
        return [self.run] if self.against is None else [self.run, self.against]

    @property
    def is_finished(self) -> bool:
        return all(len(run.answers) == self.n_tasks for run in self.runs)

    def with_answers(self, index: int, answers: Sequence[Answer]) -> "Evaluation":
        """A copy of this evaluation with more answers of ``runs[index]``."""
        runs = self.runs
        runs[index] = dataclasses.replace(runs[index], answers=(*runs[index].answers, *answers))
        return dataclasses.replace(self, run=runs[0], against=None if len(runs) == 1 else runs[1])

    def save(self, path: Path) -> None:
        """Write it to ``path``, whole or not at all; ``ReportError`` if that fails."""
        summary = {"summary": summary_of(self)} if self.is_finished else {}
        data = {"format": FORMAT, "version": VERSION, "finished": self.is_finished, **dataclasses.asdict(self), **summary}
        write_atomically(path, (_json_text(data) + "\n").encode(), kind="evaluation", error=ReportError)

    @classmethod
    def load(cls, path: Path) -> "Evaluation":
        """Read what ``save`` wrote; ``ReportError`` for anything else, also if the summary does not match the answers."""
        data = read_json(path, kind="evaluation", error=ReportError)
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ReportError(
                f"{path} is not an evaluation that this version can read",
                expected=f"a file made by `trt-kv evaluate --out`, format {FORMAT!r} {VERSION}",
            )
        fields = {key: value for key, value in data.items() if key not in ("format", "version", "finished", "summary")}
        evaluation = dataclass_from_json(cls, fields, where="evaluation", error=ReportError, with_defaults=True)
        expected = (evaluation.is_finished, summary_of(evaluation) if evaluation.is_finished else None)
        if (found := (data.get("finished"), data.get("summary"))) != expected:
            raise ReportError(f"{path}: the summary does not follow from the answers", got=found, fix="evaluate again")
        return evaluation


def summary_of(evaluation: Evaluation) -> dict[str, Any]:
    """The statistics of a finished evaluation, overall and by group of tasks, as stored in the file."""
    answers = evaluation.run.answers
    summary = {"overall": _score(answers), "groups": _by_group(answers, lambda part: _score(_picked(answers, part)))}
    if evaluation.against is None:
        return summary
    others = evaluation.against.answers

    def compared(part: Sequence[int]) -> dict[str, Any]:
        return _rounded(dataclasses.asdict(comparison_of(_picked(answers, part), _picked(others, part))))

    against = {"overall": _score(others), "groups": _by_group(others, lambda part: _score(_picked(others, part)))}
    beside = {"overall": compared(range(len(answers))), "groups": _by_group(answers, compared)}
    return {**summary, "against": against, "comparison": beside}


def _score(answers: Sequence[Answer]) -> dict[str, Any]:
    return _rounded(dataclasses.asdict(score_of(answers)))


def _by_group(answers: Sequence[Answer], measure: Callable[[Sequence[int]], dict[str, Any]]) -> dict[str, Any]:
    return {name: measure(indices) for name, indices in groups_of(answers).items()}


def _picked(answers: Sequence[Answer], indices: Sequence[int]) -> list[Answer]:
    return [answers[index] for index in indices]


def _rounded(statistics: dict[str, Any]) -> dict[str, Any]:
    """Floats to four places, tuples as the lists that JSON makes of them."""
    return {name: _rounded_value(value) for name, value in statistics.items()}


def _rounded_value(value: Any) -> Any:
    if isinstance(value, dict):
        return _rounded(value)
    if isinstance(value, tuple):
        return [_rounded_value(item) for item in value]
    return round(value, _DIGITS) if isinstance(value, float) else value


def _json_text(value: Any, indent: str = "") -> str:
    """JSON text with one line per answer and per statistic."""
    inner = indent + "  "
    if isinstance(value, dict) and value and len(indent) < 6 and "line" not in value:
        items = [f"{inner}{json.dumps(key)}: {_json_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, list | tuple) and value and isinstance(value[0], dict):
        return "[\n" + ",\n".join(f"{inner}{_json_text(item, inner)}" for item in value) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False, ensure_ascii=False)
