"""The results file of a quality report: all measurements, from which tables and pictures are made.

Per row and document it has the correctness of the answer, its loss and the kept share, so that every statistic can be
recomputed. D documents of a cell, L layers.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.cell import Cell, pooled
from benchmarks.quality.settings import Settings
from trt_kv.errors import ReportError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.json_file import dataclass_from_json, read_json, write_atomically

FORMAT = "trt-kv-report"
VERSION = 2
LATE = "late"
"""The cell of all late questions together."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine of the measurement."""

    cpu: str
    n_cores: int
    system: str


@dataclass(frozen=True, kw_only=True)
class Versions:
    """Versions of the measurement; ``executor`` ran the dense layers."""

    trt_kv: str
    python: str
    numpy: str
    torch: str
    executor: str


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The model that was measured."""

    name: str
    digest: str
    n_layers: int
    n_parameters: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "ModelFacts":
        """Those of a checkpoint, whose tensors are read for it."""
        return cls(
            name=checkpoint.name,
            digest=checkpoint.digest,
            n_layers=checkpoint.config.n_layers,
            n_parameters=sum(checkpoint.tensor(name).numel() for name in checkpoint.tensor_names),
        )


@dataclass(frozen=True, kw_only=True)
class RecipeFacts:
    """A recipe that was calibrated for the report: its score's description, budget, kept share per layer of the cache (with
    shares of KV heads layer by layer, head by head), and ``mass`` as in ``trt_kv.recipe.Recipe``.
    """

    score: str
    budget: float
    kept: tuple[float, ...]
    mass: float

    @property
    def spread(self) -> float:
        """Largest kept share over smallest."""
        return max(self.kept) / min(self.kept)


@dataclass(frozen=True, kw_only=True)
class PolicyFacts:
    """A policy of the report.

    ``group``: "reference" (the full cache), "published", "ours", "choice" (one choice of a published policy changed),
    "threshold" and "ablation" (of ReFreeKV). ``settings``: every field of the policy that is not its default, as text.
    ``recipe``: the score whose recipe gives its layers their shares, "" if there is none. ``adaptive``: its budget is found
    from the input, or is not a share. ``searches``: the layers' shares are searched for each input.
    """

    name: str
    label: str
    group: str
    settings: str
    recipe: str
    adaptive: bool
    searches: bool
    threshold: float | None
    exempt_layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TaskFacts:
    """A task of the report. ``late``: the question is in the prompt. ``asks``: answers can be right or wrong."""

    name: str
    title: str
    description: str
    late: bool
    asks: bool


@dataclass(frozen=True, kw_only=True)
class Results:
    """A results file. A page of the KV pool holds ``page_size`` tokens of one layer in ``page_bytes``, over all its arrays."""

    command: str
    machine: Machine
    versions: Versions
    settings: Settings
    model: ModelFacts
    page_size: int
    page_bytes: int
    recipes: tuple[RecipeFacts, ...]
    policies: tuple[PolicyFacts, ...]
    tasks: tuple[TaskFacts, ...]
    cells: tuple[Cell, ...]

    def policy(self, name: str) -> PolicyFacts:
        """The policy called ``name``."""
        for policy in self.policies:
            if policy.name == name:
                return policy
        raise ReportError("the results lack a policy", got=name, expected=[policy.name for policy in self.policies])

    def in_groups(self, *groups: str) -> list[PolicyFacts]:
        """The policies of some groups, in order of the groups."""
        return [policy for group in groups for policy in self.policies if policy.group == group]

    def task(self, name: str) -> TaskFacts:
        """The task called ``name``."""
        for task in self.tasks:
            if task.name == name:
                return task
        raise ReportError("the results lack a task", got=name, expected=[task.name for task in self.tasks])

    def cell(self, task: str, context_length: int | None = None) -> Cell:
        """The cell of a task at a context; None: the main one."""
        wanted = context_length or self.settings.main_context
        for cell in self.cells:
            if (cell.task, cell.context_length) == (task, wanted):
                return cell
        raise ReportError("the results lack a cell", got=f"{task} at {wanted} tokens", fix="measure again: make report")

    def can(self, cell: Cell) -> bool:
        """Whether the model can do a task at a context with its full cache, so that policies can be compared there."""
        return self.settings.can(cell, asks=self.task(cell.task).asks)

    def compared(self, context_length: int | None = None, *, asking: bool = False) -> list[Cell]:
        """The cells of a context (None: the main one) that the model can do, in order of the tasks; with ``asking`` only those
        with right answers."""
        cells = [self.cell(task.name, context_length) for task in self.tasks if task.asks or not asking]
        return [cell for cell in cells if self.can(cell)]

    def late(self, context_length: int | None = None) -> Cell | None:
        """All late questions of a context that the model can answer in one cell; None if there are none."""
        cells = [cell for cell in self.compared(context_length) if self.task(cell.task).late]
        return pooled(LATE, cells) if cells else None

    def main_cells(self) -> list[tuple[str, Cell]]:
        """Late questions together and every other task, by name, at the main context, as far as the model can do them."""
        late = self.late()
        cells = [("late questions", late)] if late else []
        return cells + [(self.task(cell.task).title.lower(), cell) for cell in self.compared() if not self.task(cell.task).late]

    def asks(self, cell: Cell) -> bool:
        """Whether answers in a cell, which may be that of ``late``, can be right or wrong."""
        return cell.task == LATE or self.task(cell.task).asks

    def save(self, path: Path) -> None:
        """Write the results to ``path``, whole or not at all; each row gets its summary for readers."""
        data = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        for cell, cell_data in zip(self.cells, data["cells"], strict=True):
            for row, row_data in zip(cell.rows, cell_data["rows"], strict=True):
                row_data["summary"] = cell.summary(row, asks=self.task(cell.task).asks)
        write_atomically(path, (json_text(data) + "\n").encode(), kind="report", error=ReportError)

    @classmethod
    def load(cls, path: Path) -> "Results":
        """Read what ``save`` wrote; ``ReportError`` also if a row's summary does not follow from its documents."""
        data = read_json(path, kind="report", error=ReportError)
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ReportError(f"{path} is no results file that this version reads", expected=f"{FORMAT} {VERSION}")
        fields = {key: value for key, value in data.items() if key not in ("format", "version")}
        summaries = [[row.pop("summary", None) for row in cell["rows"]] for cell in fields.get("cells", [])]
        results = dataclass_from_json(cls, fields, where="results", error=ReportError)
        for cell, found in zip(results.cells, summaries, strict=True):
            for row, summary in zip(cell.rows, found, strict=True):
                expected = cell.summary(row, asks=results.task(cell.task).asks)
                if summary != expected:
                    raise ReportError(
                        f"{path}: the summary of {cell.name}, {row.name} does not follow from its documents",
                        got=summary,
                        expected=expected,
                        fix="measure again: make report",
                    )
        return results


def json_text(value: Any, indent: str = "") -> str:
    """JSON with one line per document and row."""
    inner = indent + "  "
    if isinstance(value, dict) and (not indent or "rows" in value):
        items = [f"{inner}{json.dumps(key)}: {json_text(item, inner)}" for key, item in value.items()]
        return "{\n" + ",\n".join(items) + f"\n{indent}}}"
    if isinstance(value, Sequence) and value and isinstance(value[0], dict):
        items = [f"{inner}{json_text(item, inner)}" for item in value]
        return "[\n" + ",\n".join(items) + f"\n{indent}]"
    return json.dumps(value, allow_nan=False)
