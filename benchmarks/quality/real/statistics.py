"""Means over the questions of several families, and paired differences, by bootstrap over documents.

The documents are the sample: questions about one document are not independent, so a resample draws whole documents, of all
families together. C documents (clusters), B resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import numpy.typing as npt

from benchmarks.quality.real.results import MarkCell, MarkRow
from trt_kv.calibration.statistics import FEWEST_DOCUMENTS, Estimate
from trt_kv.errors import ReportError

Floats = npt.NDArray[np.float64]
Key = tuple[str, float | None]
N_RESAMPLES = 4000
QUANTILES = (2.5, 97.5)
SAME_BYTES = 1.02
"""A policy may hold so many times another's bytes and still count as holding no more: pages are rounded up."""


@dataclass(frozen=True)
class Marks:
    """The marks of all rows that several cells, of one mode and length, have in common."""

    cells: tuple[MarkCell, ...]

    @property
    def n_documents(self) -> int:
        return sum(cell.n_documents for cell in self.cells)

    @cached_property
    def keys(self) -> list[Key]:
        """The rows that every cell has, in order."""
        return [row.key for row in self.cells[0].rows if all(cell.row(*row.key) is not None for cell in self.cells)]

    def mean(self, key: Key) -> Estimate:
        """The mean mark of a row, each document with equal weight, and its 95 % interval."""
        return mean_over(self._of_documents(key).tolist())

    def difference(self, key: Key, other: Key) -> Estimate:
        """The mean of one row minus that of another on the same documents, and its 95 % interval."""
        return mean_over((self._of_documents(key) - self._of_documents(other)).tolist(), lowest=-1.0)

    def mean_of(self, key: Key, name: str) -> float | None:
        """The mean over questions of another field of a row; None where it is not known for all cells."""
        values = [value for row in self.rows(key) for value in getattr(row, name)]
        return None if None in values else float(np.mean(values))

    def rows(self, key: Key) -> list[MarkRow]:
        """The row in each cell."""
        found = [row for cell in self.cells if (row := cell.row(*key)) is not None]
        if len(found) != len(self.cells):
            raise ReportError("the results lack a row", got=key, fix="measure again")
        return found

    def best_with_no_more_bytes(self, key: Key, rivals: Sequence[str]) -> Key | None:
        """Of the policies ``rivals``, at whatever share, the row of the best mean mark that holds no more bytes; None: none."""
        most = SAME_BYTES * (self.mean_of(key, "kv_bytes") or 0.0)
        able = [of for of in self.keys if of[0] in rivals and of != key and (self.mean_of(of, "kv_bytes") or 0.0) <= most]
        return max(able, key=lambda of: self.mean(of).value, default=None)

    def _of_documents(self, key: Key) -> Floats:
        """[C]"""
        means = []
        for cell, row in zip(self.cells, self.rows(key), strict=True):
            documents, marks = np.array(cell.documents), np.array(row.marks, np.float64)
            means += [marks[documents == document].mean() for document in dict.fromkeys(cell.documents)]
        return np.array(means)


def mean_over(values: Sequence[float], *, lowest: float = 0.0) -> Estimate:
    """The mean over C documents, and its interval. With fewer than ``FEWEST_DOCUMENTS`` it is everything that is possible, from
    ``lowest`` to 1, because resamples of so few documents say nothing about others.

    The resamples [B, C] are the same for every C values, so a difference of two rows is paired.
    """
    found_C = np.asarray(values, np.float64)
    mean = float(found_C.mean())
    if len(found_C) < FEWEST_DOCUMENTS:
        return Estimate(value=mean, low=lowest, high=1.0)
    low, high = np.percentile(found_C[_draws(len(found_C))].mean(axis=1), QUANTILES)
    return Estimate(value=mean, low=min(mean, float(low)), high=max(mean, float(high)))


@cache
def _draws(n_documents: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(n_documents, size=(N_RESAMPLES, n_documents))
