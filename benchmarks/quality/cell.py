"""Measurements of one task at one context length: documents, and a row per policy and kept share.

D documents of the cell, L layers.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from trt_kv.calibration.statistics import (
    Estimate,
    mean_interval,
    perplexity_interval,
    perplexity_ratio,
    token_share_interval,
    wilson_interval,
)
from trt_kv.errors import ReportError

FULL = "full"


@dataclass(frozen=True, kw_only=True)
class Document:
    """One document: the seed it was drawn with, and its lengths in tokens."""

    seed: int
    n_prompt_tokens: int
    n_counted_tokens: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One policy at one mean kept share (``budget``; None if the policy has an adaptive budget) on all documents of a cell.

    Per document: ``right``: a character, "1" if the greedy answer is exact; ``losses``: summed negative log-likelihood of the
    counted answer tokens, in nats; ``agreed``: number of these tokens whose greedy choice is that of the full cache; ``kept``:
    share of the prompt's tokens that is cached after eviction, mean over all layers. Means over documents, after eviction and
    before decoding: ``kept_by_layer`` shares, ``kv_bytes`` of the pages that hold them, ``kept_place`` of the kept tokens in
    the prompt (0 first, 1 last), shares ``fact_kept`` and ``question_kept`` of the fact's and the question's tokens (None if
    the prompt has none).
    """

    policy: str
    budget: float | None
    right: str
    losses: tuple[float, ...]
    agreed: tuple[int, ...]
    kept: tuple[float, ...]
    kept_by_layer: tuple[float, ...]
    kv_bytes: float
    kept_place: float
    fact_kept: float | None
    question_kept: float | None

    @property
    def name(self) -> str:
        """E.g. "snapkv at 0.2"."""
        return self.policy if self.budget is None else f"{self.policy} at {self.budget}"

    @property
    def answers(self) -> list[bool]:
        """Whether each document's answer is right."""
        return [answer == "1" for answer in self.right]

    @cached_property
    def accuracy(self) -> Estimate:
        """Share of exact answers."""
        return wilson_interval(self.right.count("1"), len(self.right))

    @cached_property
    def mean_kept(self) -> float:
        """Mean kept share over documents and layers."""
        return float(np.mean(self.kept))

    @cached_property
    def kept_interval(self) -> Estimate:
        """The same with its interval over documents."""
        return mean_interval(self.kept)

    def kept_without(self, exempt_layers: Sequence[int]) -> tuple[float, ...]:
        """Per document: the mean kept share over the layers that are not exempt; exempt ones keep everything."""
        n_layers, n_exempt = len(self.kept_by_layer), len(exempt_layers)
        return tuple((share * n_layers - n_exempt) / (n_layers - n_exempt) for share in self.kept)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A task at a context. Rows: the full cache first; it is the only one if the model cannot do the task.

    ``sink_mass``: share of the last prompt query's attention on the first 4 tokens, per layer, mean over heads and documents;
    empty if only the full cache was measured. ``elapsed_s``: duration of the measurement.
    """

    task: str
    context_length: int
    documents: tuple[Document, ...]
    sink_mass: tuple[float, ...]
    rows: tuple[Row, ...]
    elapsed_s: float

    def __post_init__(self) -> None:
        for row in self.rows:
            lengths = {len(row.right), len(row.losses), len(row.agreed), len(row.kept)}
            if lengths != {len(self.documents)}:
                raise ReportError(
                    f"{self.name}, {row.name}: not one result per document", got=sorted(lengths), expected=len(self.documents)
                )
        if not self.rows or self.rows[0].policy != FULL:
            raise ReportError(f"{self.name} has no row of the full cache")

    @property
    def name(self) -> str:
        """E.g. "copy at 1024 tokens"."""
        return f"{self.task} at {self.context_length} tokens"

    @property
    def full(self) -> Row:
        """The row of the full cache."""
        return self.rows[0]

    @property
    def is_compared(self) -> bool:
        """Whether any policy but the full cache was measured."""
        return len(self.rows) > 1

    def has(self, policy: str, budget: float | None = None) -> bool:
        """Whether ``policy`` was measured at ``budget``."""
        return self._find(policy, budget) is not None

    def row(self, policy: str, budget: float | None = None) -> Row:
        """The row of ``policy`` at ``budget``; policies with an adaptive budget have one row, whatever ``budget`` is."""
        row = self._find(policy, budget)
        if row is None:
            raise ReportError("the results lack a row", got=f"{self.name}, {policy} at {budget}", fix="measure again")
        return row

    def perplexity(self, row: Row) -> Estimate:
        """Perplexity of the right answer."""
        return perplexity_interval(row.losses, self._n_counted)

    def perplexity_ratio(self, row: Row, other: Row) -> Estimate:
        """Perplexity of ``row`` over that of ``other``."""
        return perplexity_ratio(row.losses, other.losses, self._n_counted)

    def agreement(self, row: Row) -> Estimate:
        """Share of the counted tokens whose greedy choice, given the right tokens before it, is that of the full cache."""
        return token_share_interval(row.agreed, self._n_counted)

    def summary(self, row: Row, *, asks: bool) -> dict[str, Any]:
        """The row's estimates, rounded as in the file."""
        measured = {"accuracy": row.accuracy} if asks else {}
        measured |= {"perplexity": self.perplexity(row), "agreement": self.agreement(row), "kept": row.kept_interval}
        return {
            name: {key: round(x, 4) for key, x in dataclasses.asdict(estimate).items()} for name, estimate in measured.items()
        }

    def _find(self, policy: str, budget: float | None) -> Row | None:
        return self._rows_by_name.get((policy, budget)) or self._rows_by_name.get((policy, None))

    @cached_property
    def _rows_by_name(self) -> dict[tuple[str, float | None], Row]:
        return {(row.policy, row.budget): row for row in self.rows}

    @property
    def _n_counted(self) -> list[int]:
        return [document.n_counted_tokens for document in self.documents]


def pooled(name: str, cells: Sequence[Cell]) -> Cell:
    """Several cells of one context as one, with the rows that all of them have; means weight all documents equally."""
    first = cells[0]
    names = [(row.policy, row.budget) for row in first.rows if all(cell.has(row.policy, row.budget) for cell in cells)]
    sizes = [len(cell.documents) for cell in cells]
    rows = [[cell.row(*of_row) for cell in cells] for of_row in names]
    return Cell(
        task=name,
        context_length=first.context_length,
        documents=tuple(document for cell in cells for document in cell.documents),
        sink_mass=tuple(np.average([cell.sink_mass for cell in cells], axis=0, weights=sizes).tolist()),
        rows=tuple(_joined(of_cells, sizes) for of_cells in rows),
        elapsed_s=sum(cell.elapsed_s for cell in cells),
    )


def _joined(rows: Sequence[Row], sizes: Sequence[int]) -> Row:
    """The rows of one policy on several sets of documents as one."""

    def mean(of: Callable[[Row], Any]) -> Any:
        return np.average([of(row) for row in rows], axis=0, weights=sizes).tolist()

    def mean_known(of: Callable[[Row], float | None]) -> float | None:
        return None if any(of(row) is None for row in rows) else mean(of)

    return Row(
        policy=rows[0].policy,
        budget=rows[0].budget,
        right="".join(row.right for row in rows),
        losses=tuple(loss for row in rows for loss in row.losses),
        agreed=tuple(agreed for row in rows for agreed in row.agreed),
        kept=tuple(share for row in rows for share in row.kept),
        kept_by_layer=tuple(mean(lambda row: row.kept_by_layer)),
        kv_bytes=mean(lambda row: row.kv_bytes),
        kept_place=mean(lambda row: row.kept_place),
        fact_kept=mean_known(lambda row: row.fact_kept),
        question_kept=mean_known(lambda row: row.question_kept),
    )
