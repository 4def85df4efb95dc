"""The weights of an engine: packed matrices where the file is mapped, the others in one array of fp32 numbers."""

import math
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.errors import EngineError
from trt_kv.plugins.packed_weights import BLOCK_SIZES, PackedWeights
from trt_kv.plugins.paging import Floats
from trt_kv.safe_path import safe_join
from trt_kv.weight_index import PackedWeight, StoredWeight, WeightIndex


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """``matrices`` by name, without ".weight"; ``constants``: all other weights, fp32, each from ``places`` on."""

    matrices: Mapping[str, PackedWeights]
    constants: Floats
    places: Mapping[str, int]


def open_weights(folder: Path, index: WeightIndex) -> Weights:
    """The weights that ``index``, which ``load_weight_index`` checked, finds in ``folder``, which are not ``unsupported``."""
    vectors = {weight.name: _read(folder, weight) for weight in index.weights}
    ends = np.cumsum([0, *map(len, vectors.values())]).tolist()
    files = {file: _mapped(safe_join(folder, file, error=EngineError)) for file in {matrix.file for matrix in index.packed}}
    matrices = {}
    for matrix in index.packed:
        name = matrix.name.removesuffix(".weight")
        matrices[name] = _matrix(files[matrix.file], matrix, vectors.get(f"{name}.bias"))
    return Weights(
        matrices=matrices,
        constants=np.concatenate([*vectors.values(), np.zeros(0, np.float32)]),
        places=dict(zip(vectors, ends, strict=False)),
    )


def unsupported(index: WeightIndex) -> str | None:
    """The first reason why ``open_weights`` cannot open weights like these; None if it can."""
    if index.dtype != "float32":
        return f"weights that are not packed are in {index.dtype}"
    stored = [f"{weight.name}, which is not in blocks of integers" for weight in index.weights if len(weight.shape) != 1]
    stored += [
        f"{matrix.name} in blocks of {matrix.format.block_size}"
        for matrix in index.packed
        if matrix.format.block_size not in BLOCK_SIZES
    ]
    return stored[0] if stored else None


def _read(folder: Path, weight: StoredWeight) -> Floats:
    path = safe_join(folder, weight.file, error=EngineError)
    vector: Floats = np.fromfile(path, np.float32, math.prod(weight.shape), offset=weight.offset)
    return vector


def _mapped(path: Path) -> NDArray[np.uint8]:
    with path.open("rb") as file:
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)


def _matrix(stored: NDArray[np.uint8], matrix: PackedWeight, bias: Floats | None) -> PackedWeights:
    shapes = matrix.format.part_shapes(matrix.shape)
    parts: dict[str, Any] = {} if bias is None else {"bias": bias}
    for (part, n_bytes), offset in zip(matrix.part_sizes.items(), matrix.offsets, strict=True):
        dtype = np.uint8 if part in ("blocks", "zero_points") else np.float32
        parts[part] = stored[offset : offset + n_bytes].view(dtype).reshape(shapes[part])
    return PackedWeights(bits=matrix.format.bits, **parts)
