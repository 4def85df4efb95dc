"""The results file of a quality report: everything that was measured, from which tables and pictures are made.

Per row and document it holds whether the answer was right and what it lost, so that every statistic can be made again.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from trt_kv.calibration.evaluation_statistics import Estimate, perplexity_interval, perplexity_ratio, wilson_interval
from trt_kv.errors import ReportError
from trt_kv.json_file import dataclass_from_json, read_json, write_atomically

FORMAT = "trt-kv-report"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where it was measured."""

    cpu: str
    n_cores: int
    system: str


@dataclass(frozen=True, kw_only=True)
class Versions:
    """With what it was measured; ``executor`` is what ran the dense parts."""

    trt_kv: str
    python: str
    numpy: str
    torch: str
    executor: str


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What was asked for. ``budgets``: mean kept shares. Lengths count tokens.

    A cell is one of ``fact_counts`` times one third of the document that the asked fact stands in.
    """

    budgets: tuple[float, ...]
    context_length: int
    text_answer_length: int
    fact_counts: tuple[int, ...]
    documents_per_cell: int
    follow_up_documents_per_cell: int
    text_documents: int
    calibration_samples: int
    calibration_seed: int
    evaluation_seed: int
    window: int


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model that was measured."""

    name: str
    digest: str
    n_layers: int
    n_parameters: int


@dataclass(frozen=True, kw_only=True)
class RecipeFacts:
    """A recipe that was calibrated for the report: its score, budget, kept share per layer and common mass."""

    score: str
    budget: float
    kept: tuple[float, ...]
    mass: float

    @property
    def spread(self) -> float:
        """Largest kept share over smallest."""
        return max(self.kept) / min(self.kept)


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document of a task. ``region``: the third of the document that the asked fact stands in, None without question."""

    n_prompt_tokens: int
    n_counted_tokens: int
    n_facts: int
    region: str | None


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant at one mean kept share on all documents of a task.

    ``right``: one character per document, "1" where the greedy answer is exact. ``losses``: summed negative log-likelihood of
    each document's counted answer tokens, in nats. Means over documents, after eviction and before decoding: ``kept_tokens``
    over all layers, ``kv_bytes`` of the pages that hold them, ``kept_by_layer`` shares, ``kept_place`` of the kept tokens in
    the prompt (0 first, 1 last), shares ``fact_kept`` and ``question_kept`` of the asked fact's and the question's tokens (None
    where the prompt has none).
    """

    variant: str
    budget: float
    right: str
    losses: tuple[float, ...]
    kept_tokens: float
    kv_bytes: float
    kept_by_layer: tuple[float, ...]
    kept_place: float
    fact_kept: float | None
    question_kept: float | None

    @property
    def answers(self) -> list[bool]:
        """Whether each document's answer is right."""
        return [answer == "1" for answer in self.right]

    @cached_property
    def accuracy(self) -> Estimate:
        """Share of exact answers."""
        return wilson_interval(self.right.count("1"), len(self.right))


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """All rows of one task."""

    name: str
    title: str
    description: str
    documents: tuple[Document, ...]
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if not len(row.right) == len(row.losses) == len(self.documents):
                raise ReportError(
                    f"{self.name}, {row.variant} at {row.budget}: not one result per document",
                    got=f"{len(row.right)} answers, {len(row.losses)} losses",
                    expected=len(self.documents),
                )

    @property
    def asks(self) -> bool:
        """Whether answers can be right or wrong; more of a text is only more or less likely."""
        return any(document.region is not None for document in self.documents)

    def row(self, variant: str, budget: float) -> Row:
        """The row of ``variant`` at ``budget``; the full cache has one row, whatever the budget."""
        for row in self.rows:
            if row.variant == variant and row.budget in (budget, 1.0):
                return row
        raise ReportError("the results lack a row", got=f"{self.name}, {variant} at {budget}", fix="measure again")

    def perplexity(self, row: Row) -> Estimate:
        """Perplexity of the right answer."""
        return perplexity_interval(row.losses, self._n_counted)

    def perplexity_ratio(self, row: Row, other: Row) -> Estimate:
        """Perplexity of ``row`` over that of ``other``."""
        return perplexity_ratio(row.losses, other.losses, self._n_counted)

    @property
    def _n_counted(self) -> list[int]:
        return [document.n_counted_tokens for document in self.documents]


@dataclass(frozen=True, kw_only=True)
class Results:
    """A results file. A page of the KV pool holds ``page_size`` tokens of one layer in ``page_bytes``, all its arrays."""

    command: str
    machine: Machine
    versions: Versions
    settings: Settings
    model: ModelFacts
    page_size: int
    page_bytes: int
    recipes: tuple[RecipeFacts, ...]
    tasks: tuple[TaskResults, ...]

    def task(self, name: str) -> TaskResults:
        """The task called ``name``."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise ReportError("the results lack a task", got=name, expected=[task.name for task in self.tasks])

    def save(self, path: Path) -> None:
        """Write the results to ``path``, whole or not at all; each row gets its accuracy and perplexity for readers."""
        data = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        for task, task_data in zip(self.tasks, data["tasks"], strict=True):
            for row, row_data in zip(task.rows, task_data["rows"], strict=True):
                row_data["summary"] = _summary(task, row)
        write_atomically(path, (_json_text(data) + "\n").encode(), kind="report", error=ReportError)

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what ``save`` wrote; ``ReportError`` also where a row's summary is not what its documents give."""
        data = read_json(path, kind="report", error=ReportError)
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ReportError(f"{path} is no results file that this version reads", expected=f"{FORMAT} {VERSION}")
        fields = {key: value for key, value in data.items() if key not in ("format", "version")}
        summaries = [[row.pop("summary", None) for row in task["rows"]] for task in fields.get("tasks", [])]
        results = dataclass_from_json(cls, fields, where="results", error=ReportError)
        for task, found in zip(results.tasks, summaries, strict=True):
            for row, summary in zip(task.rows, found, strict=True):
                if summary != _summary(task, row):
                    raise ReportError(
                        f"{path}: the summary of {task.name}, {row.variant} at {row.budget} does not follow from its documents",
                        got=summary,
                        expected=_summary(task, row),
                        fix="measure again: make report",
                    )
        return results


def _summary(task: TaskResults, row: Row) -> dict[str, Any]:
    measured = {"accuracy": row.accuracy} if task.asks else {}
    measured["perplexity"] = task.perplexity(row)
    return {name: {key: round(x, 4) for key, x in dataclasses.asdict(estimate).items()} for name, estimate in measured.items()}


def _json_text(value: Any, indent: str = "") -> str:
    """JSON in which the documents and rows stand on a line each."""
    inner = indent + "  "
    if isinstance(value, dict) and (not indent or "rows" in value):
        items = [f"{inner}{json.dumps(key)}: {_json_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, Sequence) and value and isinstance(value[0], dict):
        items = [f"{inner}{_json_text(item, inner)}" for item in value]
        return "[\n" + ",\n".join(items) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
