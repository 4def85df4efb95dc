"""Means over the questions of several families, and paired differences, by bootstrap over documents.

The documents are the sample: questions about one document are not independent, so a resample draws whole documents, of all
families together. C documents (clusters), B resamples.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from benchmarks.quality.real.results import MarkCell, MarkRow
from trt_kv.calibration.statistics import Estimate
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
        return self._estimate(self._of_documents(key))

    def difference(self, key: Key, other: Key) -> Estimate:
        """The mean of one row minus that of another on the same documents, and its 95 % interval."""
        return self._estimate(self._of_documents(key) - self._of_documents(other))

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

    def _estimate(self, values_C: Floats) -> Estimate:
        low, high = np.percentile(values_C[self._draws].mean(axis=1), QUANTILES)
        mean = float(values_C.mean())
        return Estimate(value=mean, low=min(mean, float(low)), high=max(mean, float(high)))

    @cached_property
    def _draws(self) -> npt.NDArray[np.int64]:
        """[B, C], the same for every row, so that differences are paired."""
        return np.random.default_rng(0).integers(self.n_documents, size=(N_RESAMPLES, self.n_documents))


def mean_over(values: Sequence[float]) -> Estimate:
    """The mean over documents, and its interval by the same bootstrap."""
    found = np.asarray(values, np.float64)
    draws = np.random.default_rng(0).integers(len(found), size=(N_RESAMPLES, len(found)))
    low, high = np.percentile(found[draws].mean(axis=1), QUANTILES)
    mean = float(found.mean())
    return Estimate(value=mean, low=min(mean, float(low)), high=max(mean, float(high)))
