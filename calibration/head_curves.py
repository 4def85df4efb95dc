"""kvpress's files of LU-KV (``lukv_press.py``): REMOVED shares of KV heads at 99 budgets, a numpy array [99, L, K].

Row r is for a mean removed share of r + 1 percent.
"""

import io
import tokenize
import warnings
from pathlib import Path

import numpy as np

from trt_kv.errors import RecipeError
from trt_kv.head_shares import LEAST_KEPT, N_ROWS, HeadShares, means
from trt_kv.json_file import write_atomically
from trt_kv.recipe import CREATED_BY, CalibrationRecord, Protected, Recipe, RecipeModel, RecipeScore

MAX_BYTES = 64 * 2**20
"""More than the curves of any model take."""
_DAMAGED = (
    *(ValueError, EOFError, MemoryError, OverflowError, RecursionError, SyntaxError, TypeError, UserWarning),
    tokenize.TokenError,
)
"""What numpy raises for files that are not arrays, or whose headers are not."""


def recipe_from_curves(
    path: Path,
    *,
    model: RecipeModel,
    n_kv_heads: int,
    score: RecipeScore,
    budget: float,
    protected: Protected,
) -> Recipe:
    """The recipe for ``budget`` from a file that does not identify its checkpoint, so it is bound to ``model``.

    A head that would keep nothing keeps a millionth, so that it has its protected tokens and one more. ``RecipeError`` for a
    file that cannot be read, holds Python objects, or has another shape or values that are no shares.
    """
    removed = _read(path)
    expected = (N_ROWS, model.n_layers, n_kv_heads)
    if removed.shape != expected:
        raise RecipeError(
            f"the curves in {path} are not of this model",
            got=f"shape {list(removed.shape)}",
            expected=f"{list(expected)}: budgets, layers, KV heads",
            fix="take the file that was calibrated for this model",
        )
    if not np.isfinite(removed).all() or removed.min() < 0.0 or removed.max() > 1.0:
        raise RecipeError(f"the curves in {path} hold values that are no shares", expected="removed shares in [0, 1]")
    averages = removed.mean(axis=(1, 2))
    if averages[-1] < averages[0]:
        raise RecipeError(
            f"the curves in {path} descend",
            got=f"{averages[0]:.3f} removed in the first row, {averages[-1]:.3f} in the last",
            expected="REMOVED shares, from 1 to 99 percent",
            fix="were these kept ones?",
        )
    kept = np.maximum(1.0 - removed, LEAST_KEPT).round(6)
    heads = HeadShares(rows=tuple(tuple(map(tuple, row)) for row in kept.tolist()))
    return Recipe(
        method="lukv",
        score=score,
        budget=budget,
        kept=means(heads.at(budget)),
        mass=None,
        protected=protected,
        model=model,
        calibration=CalibrationRecord(source=f"curves {path.name}", seed=None, samples=()),
        curves=None,
        heads=heads,
        created_by=CREATED_BY,
    )


def write_curves(recipe: Recipe, heads: HeadShares, folder: Path) -> Path:
    """Write the curves of ``recipe`` into ``folder`` as kvpress reads them, fp32. Returns the file's path."""
    name = "".join(c if c.isalnum() or c in "-." else "-" for c in recipe.model.name)
    path = folder / f"{name}_{recipe.score.name}_lukv.npy"
    content = io.BytesIO()
    np.save(content, (1.0 - np.array(heads.rows)).astype(np.float32), allow_pickle=False)
    write_atomically(path, content.getvalue(), kind="curves", error=RecipeError)
    return path


def _read(path: Path) -> np.ndarray:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise RecipeError(f"{path} is too large for curves", got=path.stat().st_size, expected=f"at most {MAX_BYTES} bytes")
        with path.open("rb") as file, warnings.catch_warnings():
            warnings.simplefilter("error")  # of headers that are not as numpy writes them
            array: np.ndarray = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as cause:
        raise RecipeError(f"cannot read the curves {path}", got=cause.strerror or str(cause), expected="a .npy file") from cause
    except _DAMAGED as cause:
        raise RecipeError(
            f"{path} is not a numpy array of numbers", got=str(cause), expected="a .npy file, without Python objects in it"
        ) from cause
    if array.dtype.kind != "f":
        raise RecipeError(f"{path} is not an array of floats", got=array.dtype, expected="a .npy file in float32 or float64")
    return array.astype(np.float64)
