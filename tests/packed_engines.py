"""What an engine with quantised weights holds, and a checkpoint of the same values as numbers."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trt_kv.export.checkpoints.base import Checkpoint, QuantizedBlocks
from trt_kv.export.packing import PackedMatrix
from trt_kv.manifest import GRAPHS, load_manifest
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.weight_index import load_weight_index


class ValuesOnly:
    """``checkpoint`` with some values replaced, as if it were stored as numbers."""

    def __init__(self, checkpoint: Checkpoint, values: Mapping[str, np.ndarray] | None = None) -> None:
        self._checkpoint, self._values = checkpoint, values or {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    @property
    def digest(self) -> str:
        """Another one: tests trace the graphs of a checkpoint once."""
        own = hashlib.sha256(b"".join(np.ascontiguousarray(values).tobytes() for values in self._values.values()))
        return f"sha256:{own.hexdigest()}"

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self._values[name]) if name in self._values else self._checkpoint.tensor(name)

    def scheme(self, name: str) -> str | None:
        return None

    def quantized(self, name: str) -> QuantizedBlocks | None:
        return None


def packed_matrices(engine: Path) -> dict[str, PackedMatrix]:
    """The matrices in blocks, read from the engine's files."""
    manifest = load_manifest(engine)
    index = load_weight_index(engine / GRAPHS, manifest.config.tensor_shapes())
    matrices = {}
    for weight in index.packed:
        stored = (engine / GRAPHS / weight.file).read_bytes()
        parts = {}
        for (part, shape), offset in zip(weight.format.part_shapes(weight.shape).items(), weight.offsets, strict=True):
            dtype = np.uint8 if part in ("blocks", "zero_points") else np.float32
            parts[part] = np.frombuffer(stored, dtype, count=int(np.prod(shape)), offset=offset).reshape(shape)
        matrices[weight.name] = PackedMatrix(bits=weight.format.bits, block_size=weight.format.block_size, **parts)
    return matrices


def logits_of(dense: DenseExecutor, ids: np.ndarray) -> Floats:
    """Of each token, where every token attends to its own query."""
    rows = np.arange(len(ids), dtype=np.int64)
    return dense.run(ids, rows, rows, lambda _layer, q, _k, _v: q)
