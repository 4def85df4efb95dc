"""Where the weights of an engine are: packed matrices in the mapped file, everything small in one array of fp32 numbers."""

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.errors import EngineError
from trt_kv.safe_path import safe_join
from trt_kv.weight_index import PackedWeight, StoredWeight, WeightIndex

COLUMNS = ("bits", "block_size", "n_rows", "n_columns", "blocks", "scales", "zero_points", "offsets", "bias")
"""Of a row of ``Weights.matrices``: sizes, then bytes in the mapped file; of a matrix of 32 bits, which is among the constants,
``blocks`` is its place there. ``bias`` is a place among the constants. -1: there is none.
"""
MOST_CONSTANTS = 4096
"""Numbers of an fp32 matrix: those that are larger are packed, unless their rows cannot be divided into blocks."""


@dataclass(frozen=True, kw_only=True)
class Weights:
    """``mapped``: the file of the packed matrices, uint8. ``matrices``: a row of ``COLUMNS`` for each, at ``matrix_ids``.
    ``constants``: all other weights, fp32, at ``places``.
    """

    mapped: NDArray[np.uint8]
    matrices: NDArray[np.int64]
    matrix_ids: Mapping[str, int]
    constants: NDArray[np.float32]
    places: Mapping[str, int]


class UnsupportedWeights(Exception):  # noqa: N818 -- not an error: another executor can run the engine
    """Weights that are stored in a way that the products here cannot read."""


def open_weights(folder: Path, index: WeightIndex) -> Weights:
    """The weights that ``index``, which ``load_weight_index`` checked, finds in ``folder``. ``UnsupportedWeights`` says which
    one cannot be used.
    """
    _check_supported(index)
    places, constants = _constants(folder, index)
    rows = {matrix.name: _row(matrix, places) for matrix in index.packed}
    for weight in index.weights:
        if len(weight.shape) == 2:
            bias = places.get(_bias_of(weight.name), -1)
            rows[weight.name] = [32, 0, *weight.shape, places[weight.name], -1, -1, -1, bias]
    return Weights(
        mapped=_mapped(safe_join(folder, index.packed[0].file, error=EngineError)),
        matrices=np.array(list(rows.values()), np.int64),
        matrix_ids={name: row for row, name in enumerate(rows)},
        constants=constants,
        places=places,
    )


def _check_supported(index: WeightIndex) -> None:
    if len({matrix.file for matrix in index.packed}) != 1:
        raise UnsupportedWeights("there are no packed matrices" if not index.packed else "packed matrices are in several files")
    for weight in index.weights:
        if len(weight.shape) == 2 and math.prod(weight.shape) > MOST_CONSTANTS:
            raise UnsupportedWeights(f"{weight.name} is not packed")
    if index.dtype != "float32":
        raise UnsupportedWeights(f"weights that are not packed are in {index.dtype}")


def _constants(folder: Path, index: WeightIndex) -> tuple[dict[str, int], NDArray[np.float32]]:
    pieces, places, n_numbers = [], {}, 0
    for weight in index.weights:
        pieces.append(_read(folder, weight))
        places[weight.name] = n_numbers
        n_numbers += len(pieces[-1])
    return places, np.concatenate([*pieces, np.zeros(0, np.float32)])


def _read(folder: Path, weight: StoredWeight) -> NDArray[np.float32]:
    path = safe_join(folder, weight.file, error=EngineError)
    return np.fromfile(path, np.float32, math.prod(weight.shape), offset=weight.offset)


def _row(matrix: PackedWeight, places: Mapping[str, int]) -> list[int]:
    parts: dict[str, int] = dict(zip(matrix.part_sizes, matrix.offsets, strict=True))
    at = [parts.get(part, -1) for part in ("blocks", "scales", "zero_points", "offsets")]
    return [matrix.format.bits, matrix.format.block_size, *matrix.shape, *at, places.get(_bias_of(matrix.name), -1)]


def _bias_of(weight: str) -> str:
    return f"{weight.removesuffix('.weight')}.bias"


def _mapped(path: Path) -> Any:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
