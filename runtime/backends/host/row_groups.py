"""Results of a row that do not depend on how many rows a step has, where a library's products do.

A product with quantised weights may take one row in another order of sums than several, or the last of an odd number of rows
than the others. Steps whose rows are a multiple of some number have no such rows.
"""

import numpy as np

from trt_kv.errors import UsageError
from trt_kv.manifest import Manifest
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.base import Attend, DenseExecutor
from trt_kv.runtime.backends.step import Ints

_GROUPS = (1, 2, 4, 8)
_COUNTS = (1, 2, 3, 9)
"""How many groups of rows are compared."""


def with_rows_alike(dense: DenseExecutor, manifest: Manifest, *, wanted: bool | None) -> DenseExecutor:
    """``dense``, or if its rows depend on their number, ``dense`` with steps padded so that they do not.

    Engines with quantised weights are tried, in a few small steps. ``wanted`` False: as it is. True: ``UsageError`` if no
    padding helps; None: then as it is.
    """
    if manifest.quantization is None or wanted is False:
        return dense
    group = next((group for group in _GROUPS if _rows_are_alike(dense, group)), None)
    if group is None and wanted:
        raise UsageError(
            "results would depend on how many tokens a step has, whatever their number is a multiple of",
            got=f"batch_invariant=True with {dense.description}, accuracy level {manifest.quantization.accuracy_level}",
            fix="leave batch_invariant out, or build the engine with another block size or accuracy level",
        )
    return dense if group in (None, 1) else RowGroups(dense, group)


class RowGroups:
    """Runs ``dense`` on a multiple of ``group`` rows: the last row is repeated. See ``DenseExecutor``."""

    def __init__(self, dense: DenseExecutor, group: int) -> None:
        self._dense = dense
        self._group = group

    @property
    def description(self) -> str:
        return f"{self._dense.description}, rows in groups of {self._group}"

    def run(self, input_ids: Ints, positions: Ints, logit_rows: Ints, attend: Attend) -> Floats:
        """See ``DenseExecutor.run``."""
        n_rows, n_logits = len(input_ids), len(logit_rows)

        def attend_to_own(layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
            return self._padded(attend(layer, q[:n_rows], k[:n_rows], v[:n_rows]))

        logits = self._dense.run(self._padded(input_ids), self._padded(positions), self._padded(logit_rows), attend_to_own)
        return logits[:n_logits]

    def _padded(self, rows: np.ndarray) -> np.ndarray:
        """With the last row repeated up to a multiple of the group."""
        missing = -len(rows) % self._group
        return rows if not missing else np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])


def _rows_are_alike(dense: DenseExecutor, group: int) -> bool:
    """Whether rows have the same logits in every number of groups; tokens attend to nothing."""
    first, *others = (_logits(dense, group * count) for count in _COUNTS)
    return all(np.array_equal(first, logits[: len(first)]) for logits in others)


def _logits(dense: DenseExecutor, n_rows: int) -> Floats:
    """Of ``n_rows`` tokens, of which the first are always the same."""
    rows = np.arange(n_rows, dtype=np.int64)
    return dense.run(rows, rows, rows, lambda _layer, q, _k, _v: q)
