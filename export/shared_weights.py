"""The weights of an engine that is built beside another one of the same checkpoint: a hard link instead of another copy.

Nothing that the other engine says is taken on trust: every weight is compared with the checkpoint's. Engines that share a file
may be deleted in any order. If the file is damaged, verification finds that in all of them.
"""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from trt_kv.errors import EngineError, TrtKvError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.graph import WEIGHTS_FILE
from trt_kv.export.packed_weights import PackedWeights, is_traced_exactly
from trt_kv.manifest import FILE_NAME, GRAPHS, load_manifest
from trt_kv.safe_path import safe_join
from trt_kv.weight_index import WeightIndex, load_weight_index


def link_weights(
    checkpoint: Checkpoint,
    destination: Path,
    folder: Path,
    *,
    dtype: str,
    packed: PackedWeights | None,
    on_weight: Callable[[int, int], None],
) -> dict[str, int] | None:
    """Link ``weights.data`` of an engine beside ``destination`` into ``folder`` if it holds the weights of ``checkpoint`` in
    ``dtype``, and those in ``packed`` in their formats.

    Returns the offset of each array of the big weights by its name in graphs, or None if there is no such engine.
    ``on_weight`` is called with (compared, total).
    """
    weights = _Weights(checkpoint, packed)
    for engine in _engines_beside(destination):
        linked = folder / WEIGHTS_FILE
        try:
            source, index = _weights_of(engine, weights, dtype)
            os.link(source, linked)
        except (TrtKvError, OSError):  # another model, no engine, one that is being removed, or a file system without links
            continue
        if not _only_we_can_change(linked):  # asked of the link: at ``source`` there may be another file by now
            linked.unlink()
            continue
        linked.chmod(0o444)  # engines of earlier versions can be written by their owner
        if weights.are_in(linked, index, on_weight):
            return _offsets(index)
        linked.unlink()
    return None


def _engines_beside(destination: Path) -> Iterator[Path]:
    """Finished engines in the same folder, one at ``destination`` among them."""
    parent = destination.absolute().parent
    yield from sorted(path.parent for path in parent.glob(f"*/{FILE_NAME}") if not path.parent.name.startswith("."))


class _Weights:
    """The big weights of a checkpoint, and how they are to be stored."""

    def __init__(self, checkpoint: Checkpoint, packed: PackedWeights | None) -> None:
        self.checkpoint = checkpoint
        self.shapes = checkpoint.config.tensor_shapes()
        self.packed = packed
        self.formats = {} if packed is None else packed.formats

    def are_in(self, file: Path, index: WeightIndex, on_weight: Callable[[int, int], None]) -> bool:
        """Whether the bytes of each of them in ``file``, and nothing else in it, are those of the checkpoint, converted."""
        places, big = _offsets(index), [name for name, shape in self.shapes.items() if not is_traced_exactly(shape)]
        if places.keys() != {array for name in big for array in self._array_names(name)}:
            return False
        stored = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
        for done, name in enumerate(big, start=1):
            for array in self._array_names(name):
                expected = self._bytes(name, array, index.dtype)
                if not torch.equal(stored[places[array] : places[array] + len(expected)], expected):
                    return False
            on_weight(done, len(big))
        return True

    def _array_names(self, name: str) -> list[str]:
        how = self.formats.get(name)
        return [name] if how is None else [f"{name}.{part}" for part in how.part_shapes(self.shapes[name])]

    def _bytes(self, name: str, array: str, dtype: str) -> torch.Tensor:
        if self.packed is not None and name in self.formats:
            part = np.ascontiguousarray(self.packed.part(name, array.rpartition(".")[2]))
            return torch.from_numpy(part.reshape(-1).view(np.uint8))
        return self.checkpoint.tensor(name).to(getattr(torch, dtype)).contiguous().reshape(-1).view(torch.uint8)


def _offsets(index: WeightIndex) -> dict[str, int]:
    """Where each array of the file of weights begins."""
    offsets = {weight.name: weight.offset for weight in index.weights if weight.file == WEIGHTS_FILE}
    for matrix in index.packed:
        parts = matrix.format.part_shapes(matrix.shape)
        if matrix.file == WEIGHTS_FILE:
            offsets |= {f"{matrix.name}.{part}": offset for part, offset in zip(parts, matrix.offsets, strict=True)}
    return offsets


def _weights_of(engine: Path, weights: _Weights, dtype: str) -> tuple[Path, WeightIndex]:
    """The file of weights and their index. Raises ``EngineError`` if they are not of this checkpoint and these formats, or if
    somebody else could change the file.
    """
    manifest = load_manifest(engine)
    if (manifest.model_digest, manifest.dtype) != (weights.checkpoint.digest, dtype) or manifest.plan is not None:
        raise EngineError(f"{engine} has other weights")
    index = load_weight_index(engine / GRAPHS, weights.shapes)
    source = safe_join(engine / GRAPHS, WEIGHTS_FILE, error=EngineError).resolve()
    if index.dtype != dtype or {matrix.name: matrix.format for matrix in index.packed} != weights.formats:
        raise EngineError(f"{engine} has other weights")
    return source, index


def _only_we_can_change(file: Path) -> bool:
    status = file.lstat()
    is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    return is_ours and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
