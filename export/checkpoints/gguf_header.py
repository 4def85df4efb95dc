"""The header of a GGUF file, read and checked before any weight is read.

Layout (ggml, "GGUF"): ``GGUF``, version, number of tensors, number of metadata entries; the entries (key, type, value); each
tensor's name, dimensions (the fastest first), type and offset; then, from the next multiple of the alignment, the bytes. All
numbers are little-endian. What is read here is bounded by the file's own size and by ``_MAX_HEADER_BYTES``.
"""

import functools
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trt_kv.errors import CheckpointError
from trt_kv.require import require

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_HEADER_BYTES = 1 << 28
"""Several times the largest vocabulary with its merges and a chat template."""
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 20
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", _BOOL: "?", 10: "<u8", 11: "<i8", 12: "<f8"}
_AGAIN = "download or copy the file again"

Metadata = dict[str, Any]
"""Key to a number, a text, a numpy array of numbers, or a list of texts."""


@dataclass(frozen=True, kw_only=True)
class GgufTensor:
    """The tensor ``name`` of one file: ``shape`` in torch's order, ``scheme`` such as "F32" or "Q4_1", and where its bytes are.

    A block of ``block_items`` values, all of one row, has ``block_bytes`` bytes.
    """

    path: Path
    name: str
    scheme: str
    shape: tuple[int, ...]
    block_items: int
    block_bytes: int
    start: int

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        return self.shape[-1] // self.block_items * self.block_bytes

    @property
    def n_bytes(self) -> int:
        return self.n_rows * self.row_bytes

    def read(self, first_row: int = 0, n_rows: int | None = None) -> np.ndarray:
        """The bytes of ``n_rows`` rows, by default all, as uint8 ``[rows, row_bytes]``.

        Raises ``CheckpointError`` if the file has become shorter or cannot be read.
        """
        rows = self.n_rows - first_row if n_rows is None else n_rows
        try:
            data = np.fromfile(
                self.path, dtype=np.uint8, count=rows * self.row_bytes, offset=self.start + first_row * self.row_bytes
            )
        except OSError as error:
            raise CheckpointError(f"cannot read tensor {self.name!r} of {self.path}", got=error.strerror, fix=_AGAIN) from error
        if len(data) != rows * self.row_bytes:
            raise CheckpointError(f"{self.path} became shorter while it was read", fix=_AGAIN)
        return data.reshape(rows, self.row_bytes)


@dataclass(frozen=True, kw_only=True)
class GgufHeader:
    """What one file says about itself: its metadata, and its tensors by name."""

    path: Path
    metadata: Metadata
    tensors: dict[str, GgufTensor]


def read_gguf_header(path: Path) -> GgufHeader:
    """The header of the file ``path``. Raises ``CheckpointError`` unless it is consistent and the file is complete."""
    try:
        with path.open("rb") as file:
            reader = _Reader(path, file, path.stat().st_size)
            n_tensors, n_entries = _counts(reader)
            metadata = _metadata(reader, n_entries)
            alignment = _alignment(reader, metadata)
            entries = [_tensor_entry(reader) for _ in range(n_tensors)]
            data_start = -(-reader.position // alignment) * alignment
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", got=error.strerror, expected="a readable GGUF file") from error
    tensors = {entry[0]: _tensor(reader, entry, data_start, alignment) for entry in entries}
    if len(tensors) != n_tensors:
        raise reader.broken("two tensors of the same name", "names that differ")
    _check_ranges(reader, list(tensors.values()))
    return GgufHeader(path=path, metadata=metadata, tensors=tensors)


class _Reader:
    """Reads a file in order; never asks for more bytes than it has left."""

    def __init__(self, path: Path, file: BinaryIO, n_bytes: int) -> None:
        self.path = path
        self.n_bytes = n_bytes
        self.position = 0
        self._file = file
        self._end = min(n_bytes, _MAX_HEADER_BYTES)

    def bytes(self, count: int) -> bytes:
        self.expect(count)
        self.position += count
        data = self._file.read(count)
        if len(data) != count:
            raise self.broken("a file that became shorter while it was read", "a complete file")
        return data

    def expect(self, count: int) -> None:
        """Raise ``CheckpointError`` unless ``count`` more bytes may follow."""
        if count > self._end - self.position:
            raise self.broken(
                f"a header that needs {count} bytes more at byte {self.position} of {self.n_bytes}",
                f"a complete GGUF file, with a header of at most {_MAX_HEADER_BYTES} bytes",
            )

    def number(self, kind: str) -> int:
        value: int = struct.unpack(f"<{kind}", self.bytes(struct.calcsize(f"<{kind}")))[0]
        return value

    def text(self) -> str:
        data = self.bytes(self.number("Q"))
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise self.broken(f"a text that is not UTF-8: {data[:40]!r}", "texts in UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._numbers(kind, 1)[0].item()
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise self.broken(f"a value of type {kind}", "the types 0 to 12")
        kind, count = self.number("I"), self.number("Q")
        if kind in _NUMBERS:
            return self._numbers(kind, count)
        if kind != _STRING:
            raise self.broken(f"an array of type {kind}", "arrays of numbers or texts")
        self.expect(8 * count)
        return [self.text() for _ in range(count)]

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self.bytes(count * dtype.itemsize), dtype=dtype)

    def broken(self, got: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is truncated or damaged", got=got, expected=expected, fix=_AGAIN)


def _counts(reader: _Reader) -> tuple[int, int]:
    """The numbers of tensors and of metadata entries."""
    if reader.n_bytes < 24:
        raise reader.broken(f"{reader.n_bytes} bytes", "a complete GGUF file")
    magic, version = reader.bytes(4), reader.number("I")
    if magic + version.to_bytes(4, "little") == b"version ":
        raise CheckpointError(
            f"{reader.path} is a git-lfs pointer, not the weights themselves",
            got="a text file that begins with 'version '",
            expected="a GGUF file",
            fix="run 'git lfs pull' in its folder",
        )
    if magic != MAGIC:
        raise CheckpointError(f"{reader.path} is no GGUF file", got=f"first bytes {magic!r}", expected=f"{MAGIC!r}")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        big_endian = version & 0xFFFF == 0 and swapped in _VERSIONS
        raise CheckpointError(
            f"{reader.path} is " + ("a big-endian GGUF file" if big_endian else f"of GGUF version {version}"),
            got=f"version bytes {version.to_bytes(4, 'little').hex()}",
            expected="little-endian GGUF of version 2 or 3",
            fix="convert it with gguf's gguf-convert-endian"
            if big_endian
            else "convert the original checkpoint with a recent llama.cpp",
        )
    n_tensors, n_entries = reader.number("Q"), reader.number("Q")
    reader.expect(32 * n_tensors + 13 * n_entries)  # what each takes at least
    return n_tensors, n_entries


def _metadata(reader: _Reader, n_entries: int) -> Metadata:
    metadata: Metadata = {}
    for _ in range(n_entries):
        key = reader.text()
        if key in metadata:
            raise reader.broken(f"metadata with two values of {key!r}", "one value per key")
        metadata[key] = reader.value(reader.number("I"))
    return metadata


def _alignment(reader: _Reader, metadata: Metadata) -> int:
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
        raise reader.broken(f"general.alignment {alignment!r}", "a power of two")
    return alignment


_Entry = tuple[str, tuple[int, ...], int, int]
"""A tensor's name, its shape in torch's order, the number of its type, its offset."""


def _tensor_entry(reader: _Reader) -> _Entry:
    name, n_dimensions = reader.text(), reader.number("I")
    if not 1 <= n_dimensions <= _MAX_DIMENSIONS:
        raise reader.broken(f"tensor {name!r} of {n_dimensions} dimensions", f"1 to {_MAX_DIMENSIONS}")
    shape = tuple(reader.number("Q") for _ in range(n_dimensions))[::-1]
    return name, shape, reader.number("I"), reader.number("Q")


@functools.cache
def _block_sizes() -> dict[int, tuple[str, int, int]]:
    """By number of a type: its name, and the values and bytes of a block."""
    gguf = require("gguf", extra="gguf")
    return {int(known): (known.name, *size) for known, size in gguf.GGML_QUANT_SIZES.items()}


def _tensor(reader: _Reader, entry: _Entry, data_start: int, alignment: int) -> GgufTensor:
    name, shape, kind, offset = entry
    sizes = _block_sizes()
    if kind not in sizes:
        raise CheckpointError(
            f"tensor {name!r} of {reader.path} has a type that the gguf package does not know",
            got=f"type {kind}",
            expected="one of " + ", ".join(scheme for scheme, _, _ in sizes.values()),
            fix="try a newer gguf package (pip install -U gguf), or another quantisation of the model",
        )
    scheme, block_items, block_bytes = sizes[kind]
    if 0 in shape or shape[-1] % block_items:
        raise reader.broken(f"tensor {name!r} of shape {list(shape)}", f"rows of a multiple of {block_items} values ({scheme})")
    if offset % alignment:
        raise reader.broken(f"tensor {name!r} at offset {offset}", f"a multiple of {alignment}")
    return GgufTensor(
        path=reader.path,
        name=name,
        scheme=scheme,
        shape=shape,
        block_items=block_items,
        block_bytes=block_bytes,
        start=data_start + offset,
    )


def _check_ranges(reader: _Reader, tensors: list[GgufTensor]) -> None:
    """Every tensor is inside the file, and none overlaps another."""
    for before, tensor in _pairs(sorted(tensors, key=lambda tensor: tensor.start)):
        end = tensor.start + tensor.n_bytes
        if end > reader.n_bytes:
            raise reader.broken(f"{reader.n_bytes} bytes", f"{end} bytes, to the end of tensor {tensor.name!r}")
        if before is not None and before.start + before.n_bytes > tensor.start:
            raise reader.broken(f"tensors {before.name!r} and {tensor.name!r} that overlap", "tensors one after the other")


def _pairs(tensors: list[GgufTensor]) -> Iterator[tuple[GgufTensor | None, GgufTensor]]:
    yield from zip([None, *tensors], tensors, strict=False)
