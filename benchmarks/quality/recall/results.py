"""The results file of the host-resident policies: quality on the documents of the main results, and pages to be moved.

D documents of a cell, L layers, K KV heads.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.quality.cell import Cell, pooled
from benchmarks.quality.results import LATE, Machine, PolicyFacts, RecipeFacts, Results, Versions, json_text
from trt_kv.calibration.statistics import Estimate, mean_interval
from trt_kv.errors import ReportError
from trt_kv.json_file import dataclass_from_json, read_json, write_atomically

FORMAT = "trt-kv-recall-report"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class HostPlan:
    """Measurements at one context and page size, in tokens: tasks by name, and groups of policies.

    Groups "tau", "choosing" and "exempt" are measured at the shares ``sweep_budgets`` of the prompt, the others at ``budgets``.
    Several plans of one context and page size add up.
    """

    context_length: int
    page_size: int
    tasks: tuple[str, ...]
    groups: tuple[str, ...]
    budgets: tuple[float, ...]
    sweep_budgets: tuple[float, ...] = ()

    def budgets_of(self, group: str) -> tuple[float, ...]:
        """The shares at which a group is measured."""
        return self.sweep_budgets if group in ("tau", "choosing", "exempt") else self.budgets


@dataclass(frozen=True, kw_only=True)
class MovedRow:
    """Pages moved and KV heads corrected in a row of a cell. Fields of ``recall.harness.Moved``, a value per document.

    ``cosine_LK`` and ``corrected_LK`` are means over documents. ``overlap``: only documents in which pages were chosen.
    """

    cosine_LK: tuple[tuple[float, ...], ...]
    corrected_LK: tuple[tuple[float, ...], ...]
    corrected_heads: tuple[float, ...]
    corrected_layer_steps: tuple[float, ...]
    ahead: tuple[float, ...]
    late: tuple[float, ...]
    overlap: tuple[float, ...]

    def mean(self, field: str) -> Estimate:
        """The mean of a field over documents, with its interval."""
        return mean_interval(getattr(self, field))

    @property
    def moved(self) -> float:
        """Pages of a KV head per step, ahead and late."""
        return float(np.mean(self.ahead) + np.mean(self.late))


@dataclass(frozen=True, kw_only=True)
class HostCell(Cell):
    """A cell with host-resident policies after the full cache. "Kept" in its rows means attended to by a step, mean over decode
    steps; ``moved`` has an entry per row except the first. ``page_head_bytes``: keys and values of one KV head in a page.
    """

    page_size: int
    page_head_bytes: int
    moved: tuple[MovedRow, ...]

    def with_rows_of(self, other: "HostCell") -> "HostCell":
        """This cell with the policies of another one, whose documents must be the same."""
        check_documents(self, other)
        return dataclasses.replace(
            self,
            rows=(*self.rows, *other.rows[1:]),
            moved=(*self.moved, *other.moved),
            elapsed_s=self.elapsed_s + other.elapsed_s,
        )

    def moved_by(self, policy: str, budget: float | None = None) -> MovedRow:
        """The movements of a row."""
        return self.moved[self.rows.index(self.row(policy, budget)) - 1]


@dataclass(frozen=True, kw_only=True)
class RecallResults:
    """A results file; ``sinks`` and ``recent`` tokens are attended to by every policy."""

    command: str
    machine: Machine
    versions: Versions
    model_digest: str
    sinks: int
    recent: int
    plans: tuple[HostPlan, ...]
    recipes: tuple[RecipeFacts, ...]
    policies: tuple[PolicyFacts, ...]
    cells: tuple[HostCell, ...]

    @property
    def main(self) -> HostPlan:
        """The main plan: the first."""
        return self.plans[0]

    @property
    def swept_budget(self) -> float:
        """The share at which sweeps are shown: the largest one measured."""
        return max(self.main.sweep_budgets)

    def in_groups(self, *groups: str) -> list[PolicyFacts]:
        """The policies of some groups, in order of the groups."""
        return [policy for group in groups for policy in self.policies if policy.group == group]

    def policy(self, name: str) -> PolicyFacts:
        """The policy called ``name``."""
        return next(policy for policy in self.policies if policy.name == name)

    def cell(self, task: str, context_length: int | None = None, page_size: int | None = None) -> HostCell | None:
        """All measurements of a task, None if there are none; by default at the main context and page size.

        ``ReportError`` where several plans measured it on different documents.
        """
        wanted = (task, context_length or self.main.context_length, page_size or self.main.page_size)
        found = [cell for cell in self.cells if (cell.task, cell.context_length, cell.page_size) == wanted]
        if not found:
            return None
        first, *others = found
        for other in others:
            first = first.with_rows_of(other)
        return first

    def save(self, path: Path) -> None:
        """Write the results to ``path``, whole or not at all."""
        data = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        write_atomically(path, (json_text(data) + "\n").encode(), kind="report", error=ReportError)

    @classmethod
    def load(cls, path: Path) -> "RecallResults":
        """Read what ``save`` wrote."""
        data = read_json(path, kind="report", error=ReportError)
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ReportError(f"{path} is no results file that this version reads", expected=f"{FORMAT} {VERSION}")
        fields = {key: value for key, value in data.items() if key not in ("format", "version")}
        return dataclass_from_json(cls, fields, where="recall results", error=ReportError)


def late_cell(recall: RecallResults, results: Results, context_length: int, page_size: int) -> HostCell | None:
    """All late questions of a context in one cell: those that the model can answer and that were measured."""
    tasks = [task.name for task in results.tasks if task.late]
    found = [recall.cell(task, context_length, page_size) for task in tasks]
    cells = [cell for cell in found if cell is not None and results.can(results.cell(cell.task, context_length))]
    return _pooled(cells) if cells else None


def beside(results: Results, cell: HostCell) -> Cell:
    """The cell with all rows that were measured on its documents: those of the main results, then the host-resident ones.

    ``ReportError`` if the documents are not the same.
    """
    late = cell.task == LATE
    main = results.late(cell.context_length) if late else results.cell(cell.task, cell.context_length)
    if main is None:
        raise ReportError(f"{cell.name} was not measured with policies that drop tokens", fix="measure again: make report")
    check_documents(main, cell)
    return Cell(
        task=cell.task,
        context_length=cell.context_length,
        documents=cell.documents,
        sink_mass=(),
        rows=(*main.rows, *cell.rows[1:]),
        elapsed_s=main.elapsed_s + cell.elapsed_s,
    )


def check_documents(cell: Cell, other: Cell) -> None:
    """``ReportError`` unless two cells were measured on the same documents, with the same answers of the full cache."""
    if (cell.documents, cell.full.right) != (other.documents, other.full.right):
        raise ReportError(f"{cell.name}: some policies were measured on other documents", fix="measure again: make report")


def _pooled(cells: Sequence[HostCell]) -> HostCell:
    cell = pooled(LATE, cells)
    first = cells[0]
    rows = [[of.moved_by(row.policy, row.budget) for of in cells] for row in cell.rows[1:]]
    sizes = [len(of.documents) for of in cells]
    fields = {field.name: getattr(cell, field.name) for field in dataclasses.fields(Cell)}
    return HostCell(
        **fields,
        page_size=first.page_size,
        page_head_bytes=first.page_head_bytes,
        moved=tuple(_joined(of_cells, sizes) for of_cells in rows),
    )


def _joined(rows: Sequence[MovedRow], sizes: Sequence[int]) -> MovedRow:
    def means(field: str) -> tuple[tuple[float, ...], ...]:
        mean_LK = np.average([getattr(row, field) for row in rows], axis=0, weights=sizes)
        return tuple(tuple(heads) for heads in mean_LK.tolist())

    per_document = ("corrected_heads", "corrected_layer_steps", "ahead", "late", "overlap")
    return MovedRow(
        cosine_LK=means("cosine_LK"),
        corrected_LK=means("corrected_LK"),
        **{field: tuple(value for row in rows for value in getattr(row, field)) for field in per_document},
    )
