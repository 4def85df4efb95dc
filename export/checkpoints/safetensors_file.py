"""Safetensors headers, read and checked before any weight is read.

Layout (huggingface/safetensors, "Format"): 8 bytes little-endian header length, a JSON header naming each tensor's dtype, shape
and byte range, then the bytes.
"""

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_kv.errors import CheckpointError
from trt_kv.require import require

if TYPE_CHECKING:
    import torch

WEIGHT_DTYPES = ("F64", "F32", "F16", "BF16")
"""Types of weights that trt-kv reads. Tensors that it does not use may have others."""

_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ITEM_BYTES |= {"F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}

_PREFIX_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
_CHUNK_BYTES = 1 << 22
_AGAIN = "download or copy the file again"


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """Location of the tensor ``name``: ``start`` and ``n_bytes`` are byte counts from the beginning of the file ``path``."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    n_bytes: int

    def chunks(self) -> Iterator[bytes]:
        """The tensor's bytes in chunks of a few MiB. Raises ``CheckpointError`` if they cannot be read."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                left = self.n_bytes
                while left:
                    piece = file.read(min(left, _CHUNK_BYTES))
                    if not piece:
                        raise CheckpointError(f"{self.path} became shorter while it was read", fix=_AGAIN)
                    left -= len(piece)
                    yield piece
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}", got=error.strerror, fix=_AGAIN) from error

    def read(self) -> "torch.Tensor":
        """The tensor in its stored dtype, memory-mapped: bytes are read on use. ``CheckpointError`` if it cannot be read."""
        safetensors = require("safetensors")
        try:
            with safetensors.safe_open(self.path, framework="pt") as file:
                tensor: torch.Tensor = file.get_tensor(self.name)
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"cannot read tensor {self.name!r} of {self.path}", got=str(error), expected="the file as opened"
            ) from error
        return tensor


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file by name. Raises ``CheckpointError`` unless the file is complete and its header is consistent."""
    try:
        with path.open("rb") as file:
            prefix = file.read(_PREFIX_BYTES)
            _refuse_lfs_pointer(path, prefix)
            header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == _PREFIX_BYTES else 0
            file_bytes = path.stat().st_size
            if not 0 < header_bytes <= min(_MAX_HEADER_BYTES, file_bytes - _PREFIX_BYTES):
                raise _broken(
                    path, f"a header of {header_bytes} bytes in a file of {file_bytes} bytes", "a complete safetensors header"
                )
            header = json.loads(file.read(header_bytes))
    except OSError as error:
        raise CheckpointError(f"cannot read {path}", got=error.strerror, expected="a readable safetensors file") from error
    except (ValueError, RecursionError) as error:
        raise _broken(path, f"a header that is not JSON ({error})", "a JSON header") from error
    data_start = _PREFIX_BYTES + header_bytes
    tensors = {name: _stored_tensor(path, name, entry, data_start) for name, entry in _entries(path, header)}
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.n_bytes)):
        if tensor.start != end:
            raise _broken(path, f"tensors that overlap or leave a gap at byte {end}", "tensors one after the other")
        end += tensor.n_bytes
    if end != file_bytes:
        raise _broken(path, f"{file_bytes} bytes", f"{end} bytes according to the header")
    return tensors


def _entries(path: Path, header: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(header, dict):
        raise _broken(path, f"a header that is a {type(header).__name__}", "an object with one entry per tensor")
    for name, entry in header.items():
        if name != "__metadata__":
            if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
                raise _broken(path, f"header entry {name!r}: {entry!r}", "dtype, shape and data_offsets")
            yield name, entry


def _stored_tensor(path: Path, name: str, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise _broken(path, f"header entry {name!r}: {entry!r}", "a dtype's name")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise _broken(path, f"header entry {name!r}: {entry!r}", "a shape and two byte offsets")
    n_bytes = offsets[1] - offsets[0]
    expected = math.prod(shape) * _ITEM_BYTES[dtype] if dtype in _ITEM_BYTES else n_bytes
    if n_bytes != expected or n_bytes < 0:
        raise _broken(path, f"{n_bytes} bytes for tensor {name!r}", f"{expected} bytes for its shape {shape}")
    return StoredTensor(path=path, name=name, dtype=dtype, shape=tuple(shape), start=data_start + offsets[0], n_bytes=n_bytes)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _refuse_lfs_pointer(path: Path, prefix: bytes) -> None:
    if prefix == b"version ":
        raise CheckpointError(
            f"{path} is a git-lfs pointer, not the weights themselves",
            got="a text file that begins with 'version '",
            expected="a safetensors file",
            fix="run 'git lfs pull' in the checkpoint's folder",
        )


def _broken(path: Path, got: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{path} is truncated or damaged", got=got, expected=expected, fix=_AGAIN)
