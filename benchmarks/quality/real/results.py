"""The results file of a real model: every mark of every policy on every question. I questions (items) of a cell."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.real.contenders import PolicyRow
from benchmarks.quality.real.families import FamilyFacts
from benchmarks.quality.real.settings import RealSettings
from benchmarks.quality.results import Machine, ModelFacts, RecipeFacts, Versions, json_text
from trt_kv.errors import ReportError
from trt_kv.json_file import dataclass_from_json, read_json, write_atomically

FORMAT = "trt-kv-real-report"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MarkRow:
    """One policy at one share (None: its own) on the items of a cell, [I] each.

    ``marks``: between 0 and 1. ``kept``: share of the prompt's tokens held after eviction (attended to, if the cache is on the
    host). ``kv_bytes``: of the pages that hold them. ``moved_bytes``: copied from the host while answering. ``n_generated``:
    tokens of the answer. ``fact_kept``: share of the tokens that are asked for that is held; None if they are not known.
    """

    policy: str
    budget: float | None
    marks: tuple[float, ...]
    kept: tuple[float, ...]
    kv_bytes: tuple[int, ...]
    moved_bytes: tuple[int, ...]
    n_generated: tuple[int, ...]
    fact_kept: tuple[float | None, ...]

    @property
    def key(self) -> tuple[str, float | None]:
        return self.policy, self.budget

    @property
    def name(self) -> str:
        """E.g. "snapkv at 25 %"."""
        return self.policy if self.budget is None else f"{self.policy} at {100 * self.budget:g} %"

    @cached_property
    def mean_kept(self) -> float:
        return float(np.mean(self.kept))

    @cached_property
    def mean_bytes(self) -> float:
        return float(np.mean(self.kv_bytes))

    @cached_property
    def mean_fact_kept(self) -> float | None:
        known = [share for share in self.fact_kept if share is not None]
        return float(np.mean(known)) if known else None


_PER_ITEM = [field.name for field in dataclasses.fields(MarkRow) if field.name not in ("policy", "budget")]
"""The fields of a ``MarkRow`` that have a value for each item."""


@dataclass(frozen=True, kw_only=True)
class MarkCell:
    """A family, in one mode, at one length. ``documents`` and ``n_prompt`` (tokens that were read before the eviction): [I].
    ``rows``: the full cache first.
    """

    family: str
    mode: str
    n_tokens: int
    documents: tuple[int, ...]
    n_prompt: tuple[int, ...]
    rows: tuple[MarkRow, ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.marks) != len(self.documents):
                raise ReportError(
                    f"{self.family} at {self.n_tokens}, {row.name}: not one mark per question",
                    got=len(row.marks),
                    expected=len(self.documents),
                )

    @property
    def full(self) -> MarkRow:
        return self.rows[0]

    @property
    def n_documents(self) -> int:
        return len(set(self.documents))

    def row(self, policy: str, budget: float | None) -> MarkRow | None:
        """The row of a policy at a share; None if it was not measured."""
        return self._by_key.get((policy, budget))

    @cached_property
    def _by_key(self) -> dict[tuple[str, float | None], MarkRow]:
        return {row.key: row for row in self.rows}


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Of a text's tokens under one policy, summed."""

    nats: float


@dataclass(frozen=True, kw_only=True)
class OneTalk:
    """A conversation about one document: as in ``TalkRow``, with the share ``held`` at each answer."""

    right: str
    held: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TextRow:
    """Plain text: ``losses`` of each text's tokens, in nats, for a policy at a share."""

    policy: str
    budget: float | None
    losses: tuple[float, ...]

    @property
    def key(self) -> tuple[str, float | None]:
        return self.policy, self.budget


@dataclass(frozen=True, kw_only=True)
class TalkRow:
    """A conversation about each of D documents with T turns, of one policy at one share in one mode.

    ``right``: per document a character per turn, "1" if the answer is right. ``most_held``: the largest share of the tokens
    seen that was held when an answer began, mean over layers. ``held_at_end``: the same at the last turn.
    """

    policy: str
    budget: float | None
    mode: str
    right: tuple[str, ...]
    most_held: tuple[float, ...]
    held_at_end: tuple[float, ...]

    @property
    def key(self) -> tuple[str, float | None]:
        return self.policy, self.budget


@dataclass(frozen=True, kw_only=True)
class RealResults:
    """A results file. ``tried``: the full cache alone, for every family and length; ``cells``: what is compared."""

    command: str
    machine: Machine
    versions: Versions
    settings: RealSettings
    model: ModelFacts
    weights: str
    page_size: int
    page_bytes: int
    recipes: tuple[RecipeFacts, ...]
    policies: tuple[PolicyRow, ...]
    families: tuple[FamilyFacts, ...]
    tried: tuple[MarkCell, ...]
    cells: tuple[MarkCell, ...]
    texts: tuple[TextRow, ...]
    talks: tuple[TalkRow, ...]

    def policy(self, name: str) -> PolicyRow:
        """The policy called ``name``."""
        return next(policy for policy in self.policies if policy.name == name)

    def family(self, name: str) -> FamilyFacts:
        """The family called ``name``."""
        return next(family for family in self.families if family.name == name)

    def compared(self, mode: str, n_tokens: int) -> list[MarkCell]:
        """The cells of a mode and a length."""
        return [cell for cell in self.cells if (cell.mode, cell.n_tokens) == (mode, n_tokens)]

    def save(self, path: Path) -> None:
        """Write the results to ``path``, whole or not at all."""
        data = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        write_atomically(path, (json_text(data) + "\n").encode(), kind="report", error=ReportError)

    @classmethod
    def load(cls, path: Path) -> "RealResults":
        """Read what ``save`` wrote. ``ReportError`` if it is something else."""
        data = read_json(path, kind="report", error=ReportError)
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ReportError(f"{path} is no results file that this version reads", expected=f"{FORMAT} {VERSION}")
        fields = {key: value for key, value in data.items() if key not in ("format", "version")}
        return dataclass_from_json(cls, fields, where="results", error=ReportError)


def is_able(cells: Sequence[MarkCell], settings: RealSettings) -> bool:
    """Whether the full cache does well enough in cells of one family and length for policies to be compared there."""
    return float(np.mean([mark for cell in cells for mark in cell.full.marks])) >= settings.capable_from


def of_document(cell: MarkCell, document: int) -> MarkCell:
    """The part of ``cell`` that is of one document: what ``joined`` joins."""
    at = [i for i, of in enumerate(cell.documents) if of == document]
    n_prompt = tuple(cell.n_prompt[i] for i in at)

    def part(row: MarkRow) -> MarkRow:
        return _with_items(row, lambda name: tuple(getattr(row, name)[i] for i in at))

    return dataclasses.replace(cell, documents=(document,) * len(at), n_prompt=n_prompt, rows=tuple(map(part, cell.rows)))


def joined(cells: Sequence[MarkCell]) -> MarkCell:
    """The cells of several documents as one, with the rows that all of them have."""
    first = cells[0]
    keys = [row.key for row in first.rows if all(cell.row(*row.key) is not None for cell in cells)]
    return dataclasses.replace(
        first,
        documents=tuple(document for cell in cells for document in cell.documents),
        n_prompt=tuple(n for cell in cells for n in cell.n_prompt),
        rows=tuple(_joined([row for cell in cells if (row := cell.row(*key)) is not None]) for key in keys),
    )


def _joined(rows: Sequence[MarkRow]) -> MarkRow:
    def all_of(name: str) -> tuple[float, ...]:
        return tuple(value for row in rows for value in getattr(row, name))

    return _with_items(rows[0], all_of)


def _with_items(row: MarkRow, values_of: Callable[[str], tuple[Any, ...]]) -> MarkRow:
    """``row`` with other items: the values of each field that has one for each."""
    return dataclasses.replace(row, **{name: values_of(name) for name in _PER_ITEM})  # type: ignore[arg-type]
