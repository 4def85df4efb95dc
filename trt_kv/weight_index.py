"""weights.json: file and offset of each tensor of the decoder, for backends that run the decoder without the graphs."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trt_kv.errors import EngineError
from trt_kv.json_file import MAX_DOCUMENT_BYTES, dataclass_from_json, document_text, read_json
from trt_kv.manifest import ITEM_BYTES
from trt_kv.safe_path import safe_join

FILE_NAME = "weights.json"


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """One tensor, C-contiguous and little-endian: from byte ``offset`` of ``file``, in the folder of the index."""

    name: str
    file: str
    offset: int
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class WeightIndex:
    """The tensors of a decoder, all of ``dtype``, under their names in checkpoints."""

    dtype: str
    weights: tuple[StoredWeight, ...]

    def n_bytes(self, weight: StoredWeight) -> int:
        return math.prod(weight.shape) * ITEM_BYTES[self.dtype]

    def save(self, folder: Path) -> None:
        (folder / FILE_NAME).write_text(document_text(dataclasses.asdict(self)) + "\n")


def load_weight_index(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> WeightIndex:
    """The index in ``folder``. ``EngineError`` if there is none, if its tensors are not those of ``shapes``, or if one is
    not within a file of ``folder``.
    """
    if not (folder / FILE_NAME).is_file():
        raise EngineError(
            f"{folder} has no index of its weights",
            got=f"no {FILE_NAME}",
            expected="an engine of this version of trt-kv",
            fix="build the engine again, with --force (make: FORCE=1)",
        )
    path = safe_join(folder, FILE_NAME, error=EngineError)
    data = read_json(path, kind="list of weights", error=EngineError, max_bytes=MAX_DOCUMENT_BYTES)
    index = dataclass_from_json(WeightIndex, data, where=str(path), error=EngineError)
    if index.dtype not in ITEM_BYTES or {weight.name: weight.shape for weight in index.weights} != dict(shapes):
        raise EngineError(f"{path} does not match the model's weights", fix="build the engine again")
    for weight in index.weights:
        try:
            stored = safe_join(folder, weight.file, error=EngineError)
        except EngineError as cause:
            raise EngineError(f"{path}: {cause.what}", got=cause.got, expected=cause.expected, fix=cause.fix) from cause
        n_bytes = stored.stat().st_size
        if weight.offset < 0 or weight.offset % ITEM_BYTES[index.dtype] or weight.offset + index.n_bytes(weight) > n_bytes:
            raise EngineError(
                f"{stored} does not hold {weight.name} where {path.name} says",
                got=f"{n_bytes} bytes",
                expected=f"{index.n_bytes(weight)} from byte {weight.offset} on",
                fix="build the engine again",
            )
    return index
