"""How keys and values are stored: the types of a KV cache, and the only code that converts them to and from fp32.

A *row* is the stored form of one vector of D numbers (a key or a value of one token and KV head):

    float32, float16, bfloat16     D numbers
    int8                           D integers in -127 .. 127, then the row's scale, an fp32 number in 4 bytes; a number is
                                   scale * integer, and the scale is the largest absolute value / 127

A row is written once and then only copied as it is, by eviction, recall and files alike, so what is attended to does not depend
on when a token was moved or on its neighbours. All arithmetic is in fp32 on loaded rows. numpy has no bfloat16, and numba no
float16 on CPUs: arrays hold the bits of float16 as int16 and those of bfloat16 as uint16.
"""

import platform
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.extending import intrinsic, overload
from numpy.typing import NDArray

from trt_kv.errors import UsageError
from trt_kv.kv_memory import SCALE_BYTES, row_bytes
from trt_kv.manifest import KV_DTYPES

LARGEST_INT8 = np.float32(127)
LARGEST_FLOAT16 = np.float32(65504)

_STORED_AS: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.int16,
    "bfloat16": np.uint16,
    "int8": np.int8,
}


@dataclass(frozen=True)
class KvDtype:
    """A type of a KV cache: one of ``KV_DTYPES``."""

    name: str

    def __post_init__(self) -> None:
        if self.name not in KV_DTYPES:
            raise UsageError("unsupported type of the KV cache", got=repr(self.name), expected=" or ".join(KV_DTYPES))

    @property
    def stored_as(self) -> np.dtype[Any]:
        """The type of an array of rows."""
        return np.dtype(_STORED_AS[self.name])

    def row_length(self, head_size: int) -> int:
        """W: elements of a row of ``head_size`` numbers."""
        return row_bytes(self.name, head_size) // self.stored_as.itemsize


def converts_halves() -> bool:
    """Whether this processor has instructions for float16, which kernels need: on x86 those of 2012 and later (F16C)."""
    return platform.machine() not in ("x86_64", "AMD64") or bool(get_host_cpu_features().get("f16c"))


def dtype_of(rows: NDArray[Any]) -> KvDtype:
    """The type of stored rows [..., W], by the type of their array; any type of numbers is what it is, as float32 is."""
    if rows.dtype.kind == "f":
        return KvDtype("float32")
    return KvDtype(next(name for name, stored in _STORED_AS.items() if rows.dtype == stored))


def head_size_of(rows: NDArray[Any]) -> int:
    """D of stored rows [..., W]."""
    length: int = rows.shape[-1]
    return length - SCALE_BYTES if rows.dtype == np.int8 else length


def store(values: NDArray[np.float32], dtype: KvDtype) -> NDArray[Any]:
    """The rows [..., W] of ``values`` [..., D] fp32, rounded to nearest, ties to even.

    float16 saturates at its largest finite number. NaN is loaded as NaN again.
    """
    if dtype.name == "float32":
        return values
    if dtype.name == "float16":
        return np.clip(values, -LARGEST_FLOAT16, LARGEST_FLOAT16).astype(np.float16).view(np.int16)
    if dtype.name == "bfloat16":
        return _bfloat16_bits(values)
    scales = np.abs(values).max(axis=-1, keepdims=True, initial=0.0) / LARGEST_INT8
    with np.errstate(invalid="ignore"):
        shares = np.divide(values, scales, out=np.zeros_like(values), where=scales != 0)
        integers = np.nan_to_num(np.rint(shares)).clip(-LARGEST_INT8, LARGEST_INT8).astype(np.int8)
    return np.concatenate([integers, np.ascontiguousarray(scales, np.float32).view(np.int8)], axis=-1)


def load(rows: NDArray[Any]) -> NDArray[np.float32]:
    """The values [..., D] fp32 of stored rows [..., W]; fp32 rows themselves."""
    if rows.dtype.kind == "f":
        return rows.astype(np.float32, copy=False)
    if rows.dtype == np.int16:
        return np.ascontiguousarray(rows).view(np.float16).astype(np.float32)
    if rows.dtype == np.uint16:
        return (rows.astype(np.uint32) << np.uint32(16)).view(np.float32)
    scales = np.ascontiguousarray(rows[..., -SCALE_BYTES:]).view(np.float32)
    values: NDArray[np.float32] = rows[..., :-SCALE_BYTES] * scales
    return values


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


# In kernels: fp32 number d of a row is ``scale_of(row) * number(row[d])``. The scale belongs behind a sum over d.


def number(element: Any) -> np.float32:
    """A stored element as fp32, without the row's scale. Only in kernels, where it vectorises."""
    raise NotImplementedError("numba kernels only")


def scale_of(row: Any) -> np.float32:
    """The scale of a stored row [W]: 1 unless it is int8. Only in kernels."""
    raise NotImplementedError("numba kernels only")


def put(row: Any, values: Any) -> None:
    """Store ``values`` [D] fp32 as a row [W], with the bits that ``store`` makes. Only in kernels."""
    raise NotImplementedError("numba kernels only")


@overload(number)
def _number(element: Any) -> Any:
    def as_it_is(element: Any) -> Any:
        return np.float32(element)

    def from_half(element: Any) -> Any:
        return _half_to_float(element)  # type: ignore[call-arg]  # numba passes the context

    def from_bfloat16_bits(element: Any) -> Any:
        return np.int32(np.uint32(element) << np.uint32(16)).view(np.float32)

    return {types.int16: from_half, types.uint16: from_bfloat16_bits}.get(element, as_it_is)


@overload(scale_of)
def _scale_of(row: Any) -> Any:
    def one(row: Any) -> Any:  # noqa: ARG001
        return np.float32(1.0)

    def in_last_bytes(row: Any) -> Any:
        at = len(row) - SCALE_BYTES
        low = np.uint32(np.uint8(row[at])) | np.uint32(np.uint8(row[at + 1])) << np.uint32(8)
        high = np.uint32(np.uint8(row[at + 2])) | np.uint32(np.uint8(row[at + 3])) << np.uint32(8)
        return np.int32(low | high << np.uint32(16)).view(np.float32)

    return in_last_bytes if row.dtype == types.int8 else one


@overload(put)
def _put(row: Any, values: Any) -> Any:  # noqa: ARG001
    def as_it_is(row: Any, values: Any) -> None:
        for d in range(len(values)):
            row[d] = values[d]

    def as_half(row: Any, values: Any) -> None:
        for d in range(len(values)):
            capped = LARGEST_FLOAT16 if values[d] > LARGEST_FLOAT16 else values[d]
            row[d] = _float_to_half(-LARGEST_FLOAT16 if capped < -LARGEST_FLOAT16 else capped)  # type: ignore[call-arg]

    def as_bfloat16_bits(row: Any, values: Any) -> None:
        for d in range(len(values)):
            bits = np.float32(values[d]).view(np.uint32)
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            row[d] = np.uint16(0x7FC0) if np.isnan(values[d]) else np.uint16(rounded)

    def as_int8(row: Any, values: Any) -> None:
        largest = np.float32(0.0)
        for d in range(len(values)):
            size = abs(values[d])
            if size > largest or np.isnan(size):
                largest = size
        scale = largest / LARGEST_INT8
        divisor = scale if scale != 0.0 else np.float32(np.inf)
        for d in range(len(values)):
            share = np.rint(values[d] / divisor)
            share = np.float32(0.0) if np.isnan(share) else share
            row[d] = np.int8(min(max(share, -LARGEST_INT8), LARGEST_INT8))
        bits = np.float32(scale).view(np.uint32)
        for i in range(SCALE_BYTES):
            row[len(values) + i] = np.int8(np.uint8((bits >> np.uint32(8 * i)) & np.uint32(0xFF)))

    return {types.int16: as_half, types.uint16: as_bfloat16_bits, types.int8: as_int8}.get(row.dtype, as_it_is)


@intrinsic
def _float_to_half(typing_context: Any, number: Any) -> Any:  # noqa: ARG001
    """An fp32 number as the bits of an IEEE half, rounded to nearest, ties to even."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))

    return types.int16(number), code


@intrinsic
def _half_to_float(typing_context: Any, half: Any) -> Any:  # noqa: ARG001
    """The bits of an IEEE half as fp32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:  # noqa: ARG001
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(half), code
