"""weights.json: file and offset of each tensor of the decoder, for backends that run the decoder without the graphs."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trt_kv.errors import EngineError
from trt_kv.json_file import MAX_DOCUMENT_BYTES, dataclass_from_json, document_text, read_json
from trt_kv.manifest import BLOCK_SIZES, ITEM_BYTES
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
class BlockFormat:
    """How a matrix is stored in integers of ``bits`` bits (4 or 8), in blocks of ``block_size`` along its rows.

    A block has a scale, and if there are any, a zero point and an offset.
    """

    bits: int
    block_size: int
    zero_points: bool
    offsets: bool

    def part_shapes(self, shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays that hold a matrix of ``shape``, by name: "blocks" and "zero_points" are uint8, "scales"
        and "offsets" fp32.
        """
        n_rows, n_columns = shape
        n_blocks = n_columns // self.block_size
        shapes: dict[str, tuple[int, ...]] = {
            "blocks": (n_rows, n_blocks, self.block_size * self.bits // 8),
            "scales": (n_rows, n_blocks),
        }
        if self.zero_points:
            shapes["zero_points"] = n_rows, -(-n_blocks * self.bits // 8)
        if self.offsets:
            shapes["offsets"] = n_rows, n_blocks
        return shapes


@dataclass(frozen=True, kw_only=True)
class PackedWeight:
    """A matrix of ``shape`` stored as ``format`` says: its arrays, each C-contiguous and little-endian, are in ``file``, from
    the byte that ``offsets`` has for each of ``format.part_shapes`` in its order.
    """

    name: str
    file: str
    shape: tuple[int, ...]
    format: BlockFormat
    offsets: tuple[int, ...]

    @property
    def part_sizes(self) -> dict[str, int]:
        """Bytes of each array."""
        shapes = self.format.part_shapes(self.shape)
        return {part: math.prod(shape) * part_item_bytes(part) for part, shape in shapes.items()}


def part_item_bytes(part: str) -> int:
    """Bytes of an item of an array of a packed matrix."""
    return 1 if part in ("blocks", "zero_points") else 4


@dataclass(frozen=True, kw_only=True)
class WeightIndex:
    """The tensors of a decoder under their names in checkpoints: numbers of ``dtype``, and matrices in blocks of integers."""

    dtype: str
    weights: tuple[StoredWeight, ...]
    packed: tuple[PackedWeight, ...] = ()

    def n_bytes(self, weight: StoredWeight) -> int:
        return math.prod(weight.shape) * ITEM_BYTES[self.dtype]

    def save(self, folder: Path) -> None:
        data = dataclasses.asdict(self)
        if not self.packed:
            del data["packed"]
        (folder / FILE_NAME).write_text(document_text(data) + "\n")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {weight.name: weight.shape for weight in self.weights} | {matrix.name: matrix.shape for matrix in self.packed}

    def places(self) -> Iterator[tuple[str, str, int, int, int]]:
        """Of each stored array: the weight's name, the file, offset and size in bytes, and the bytes of an item."""
        for weight in self.weights:
            yield weight.name, weight.file, weight.offset, self.n_bytes(weight), ITEM_BYTES[self.dtype]
        for matrix in self.packed:
            for (part, n_bytes), offset in zip(matrix.part_sizes.items(), matrix.offsets, strict=True):
                yield matrix.name, matrix.file, offset, n_bytes, part_item_bytes(part)


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
    index = dataclass_from_json(WeightIndex, data, where=str(path), error=EngineError, with_defaults=True)
    known = index.dtype in ITEM_BYTES and all(map(_is_consistent, index.packed))
    if not known or len(index.weights) + len(index.packed) != len(shapes) or index.shapes != dict(shapes):
        raise EngineError(f"{path} does not match the model's weights", fix="build the engine again")
    for name, file, offset, n_bytes, item_bytes in index.places():
        try:
            stored = safe_join(folder, file, error=EngineError)
        except EngineError as cause:
            raise EngineError(f"{path}: {cause.what}", got=cause.got, expected=cause.expected, fix=cause.fix) from cause
        n_stored = stored.stat().st_size
        if offset < 0 or offset % item_bytes or offset + n_bytes > n_stored:
            raise EngineError(
                f"{stored} does not hold {name} where {path.name} says",
                got=f"{n_stored} bytes",
                expected=f"{n_bytes} from byte {offset} on",
                fix="build the engine again",
            )
    return index


def _is_consistent(matrix: PackedWeight) -> bool:
    """Whether the format can be that of a matrix of this shape."""
    how = matrix.format
    sizes = how.bits in (4, 8) and how.block_size in BLOCK_SIZES and len(matrix.shape) == 2
    return sizes and matrix.shape[1] % how.block_size == 0 and len(matrix.offsets) == len(how.part_shapes(matrix.shape))
