"""The weights of an engine that is built beside another one of the same checkpoint: a hard link instead of another copy.

Nothing that the other engine says is taken on trust: every weight is compared with the checkpoint's. Engines that share a file
may be deleted in any order. If the file is damaged, verification finds that in all of them.
"""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from trt_kv.errors import EngineError, TrtKvError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.graph import WEIGHTS_FILE, is_traced_exactly
from trt_kv.manifest import FILE_NAME, GRAPHS, load_manifest
from trt_kv.safe_path import safe_join
from trt_kv.weight_index import WeightIndex, load_weight_index


def link_weights(
    checkpoint: Checkpoint, destination: Path, folder: Path, *, dtype: str, on_weight: Callable[[int, int], None]
) -> dict[str, int] | None:
    """Link ``weights.data`` of an engine beside ``destination`` into ``folder`` if it holds the weights of ``checkpoint`` in
    ``dtype``.

    Returns the offset of each big weight by name, or None if there is no such engine. ``on_weight`` is called with
    (compared, total).
    """
    big = [name for name, shape in checkpoint.config.tensor_shapes().items() if not is_traced_exactly(shape)]
    for engine in _engines_beside(destination):
        linked = folder / WEIGHTS_FILE
        try:
            source, index = _weights_of(engine, checkpoint, dtype)
            os.link(source, linked)
        except (TrtKvError, OSError):  # another model, no engine, one that is being removed, or a file system without links
            continue
        if not _only_we_can_change(linked):  # asked of the link: at ``source`` there may be another file by now
            linked.unlink()
            continue
        linked.chmod(0o444)  # engines of earlier versions can be written by their owner
        offsets = {weight.name: weight.offset for weight in index.weights if weight.file == WEIGHTS_FILE}
        if offsets.keys() == set(big) and _are_weights_of(checkpoint, linked, index, big, on_weight):
            return offsets
        linked.unlink()
    return None


def _engines_beside(destination: Path) -> Iterator[Path]:
    """Finished engines in the same folder, one at ``destination`` among them."""
    parent = destination.absolute().parent
    yield from sorted(path.parent for path in parent.glob(f"*/{FILE_NAME}") if not path.parent.name.startswith("."))


def _weights_of(engine: Path, checkpoint: Checkpoint, dtype: str) -> tuple[Path, WeightIndex]:
    """The file of weights and their index. Raises ``EngineError`` if they are not of this checkpoint and type, or if somebody
    else could change the file.
    """
    manifest = load_manifest(engine)
    if (manifest.model_digest, manifest.dtype) != (checkpoint.digest, dtype) or manifest.plan is not None:
        raise EngineError(f"{engine} has other weights")
    index = load_weight_index(engine / GRAPHS, checkpoint.config.tensor_shapes())
    source = safe_join(engine / GRAPHS, WEIGHTS_FILE, error=EngineError).resolve()
    if index.dtype != dtype:
        raise EngineError(f"{engine} has other weights")
    return source, index


def _only_we_can_change(file: Path) -> bool:
    status = file.lstat()
    is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    return is_ours and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _are_weights_of(
    checkpoint: Checkpoint, file: Path, index: WeightIndex, names: list[str], on_weight: Callable[[int, int], None]
) -> bool:
    """Whether the bytes of each weight in ``file`` are those of the checkpoint, converted."""
    stored = torch.from_file(str(file), shared=False, size=file.stat().st_size, dtype=torch.uint8)
    places = {weight.name: weight for weight in index.weights}
    for done, name in enumerate(names, start=1):
        place = places[name]
        expected = checkpoint.tensor(name).to(getattr(torch, index.dtype)).contiguous().reshape(-1).view(torch.uint8)
        if not torch.equal(stored[place.offset : place.offset + index.n_bytes(place)], expected):
            return False
        on_weight(done, len(names))
    return True
