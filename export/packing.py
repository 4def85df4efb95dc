"""Matrices as blocks of small integers, in the layout that ONNX Runtime's MatMulNBits and GatherBlockQuantized read.

Shapes: N rows, K columns, M blocks per row, S values per block (K = M * S).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trt_kv.manifest import Quantization
from trt_kv.weight_index import BlockFormat

_CHUNK_ITEMS = 1 << 20
"""Values that are quantised at a time: temporary arrays stay far below the size of a large matrix."""


@dataclass(frozen=True, kw_only=True)
class PackedMatrix:
    """A matrix ``[N, K]`` of values ``scales * (q - zero point) + offsets``, one scale, zero point and offset per block.

    ``blocks``: the q, uint8 ``[N, M, S * bits / 8]``, of 4 bits the earlier value in the low half. ``scales`` and ``offsets``:
    fp32 ``[N, M]``. ``zero_points``: uint8 ``[N, ceil(M * bits / 8)]``, packed like the q; None: ``2 ** (bits - 1)``.
    ``offsets`` None: zeros.
    """

    bits: int
    block_size: int
    blocks: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray | None = None
    offsets: np.ndarray | None = None

    @property
    def parts(self) -> dict[str, np.ndarray]:
        """The arrays that there are, by name."""
        arrays = {
            "blocks": self.blocks,
            "scales": self.scales,
            "zero_points": self.zero_points,
            "offsets": self.offsets,
        }
        return {name: array for name, array in arrays.items() if array is not None}

    def values(self) -> np.ndarray:
        """The values, fp32 ``[N, K]``: each operation rounded to fp32, in the order of the formula."""
        q = unpacked(self.blocks, self.bits)
        zeros: np.ndarray | np.float32 = np.float32(2 ** (self.bits - 1))
        if self.zero_points is not None:
            zeros = unpacked(self.zero_points, self.bits)[:, : q.shape[1], None].astype(np.float32)
        values = self.scales[..., None] * (q.astype(np.float32) - zeros)
        if self.offsets is not None:
            values = values + self.offsets[..., None]
        return np.asarray(values.reshape(len(q), -1), dtype=np.float32)


def block_format(n_columns: int, quantization: Quantization) -> BlockFormat | None:
    """How rows of ``n_columns`` values are quantised: in the largest blocks, up to those asked for, that they are a multiple
    of. None if there are none of at least 16.
    """
    block_size = quantization.block_size
    while n_columns % block_size:
        block_size //= 2
    if block_size < 16:
        return None
    return BlockFormat(bits=quantization.bits, block_size=block_size, zero_points=not quantization.symmetric, offsets=False)


def packed(values: np.ndarray, how: BlockFormat) -> PackedMatrix:
    """``values``, fp32 ``[N, K]`` and finite, rounded to blocks of ``how``, which has no offsets.

    With zero points the integers span from the least to the greatest value of a block and 0; without, the value that is
    largest in magnitude has the lowest integer. Values take the nearest integer, and then the scale that makes the squared
    error of the block least.
    """
    n_blocks = values.shape[1] // how.block_size
    pieces = [_quantized(chunk.reshape(len(chunk), n_blocks, how.block_size), how) for chunk in _chunks(values)]
    blocks, scales, zeros = (np.concatenate(arrays) for arrays in zip(*pieces, strict=True))
    return PackedMatrix(
        bits=how.bits,
        block_size=how.block_size,
        blocks=blocks,
        scales=scales,
        zero_points=packed_bits(zeros, how.bits) if how.zero_points else None,
    )


def _chunks(values: np.ndarray) -> Iterator[np.ndarray]:
    n_rows = max(1, _CHUNK_ITEMS // values.shape[1])
    for row in range(0, len(values), n_rows):
        yield np.ascontiguousarray(values[row : row + n_rows], dtype=np.float32)


def _quantized(x_RMS: np.ndarray, how: BlockFormat) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed integers, scales ``[R, M]`` and zero points ``[R, M]`` of some rows."""
    top = 2**how.bits - 1
    low_RM, high_RM = np.minimum(x_RMS.min(-1), 0), np.maximum(x_RMS.max(-1), 0)
    if how.zero_points:
        scale_RM = (high_RM - low_RM) / np.float32(top)
        zero_RM = np.rint(-low_RM / _divisor(scale_RM))
    else:
        scale_RM = np.where(high_RM > -low_RM, high_RM, low_RM) / np.float32(-(2 ** (how.bits - 1)))
        zero_RM = np.full_like(scale_RM, 2 ** (how.bits - 1))
    q_RMS = np.rint(x_RMS / _divisor(scale_RM)[..., None])
    q_RMS += zero_RM[..., None]
    np.clip(q_RMS, 0, top, out=q_RMS)
    blocks = packed_bits(q_RMS.astype(np.uint8), how.bits)
    q_RMS -= zero_RM[..., None]
    squares_RM = np.einsum("rms,rms->rm", q_RMS, q_RMS)
    fitted_RM = np.einsum("rms,rms->rm", q_RMS, x_RMS) / np.where(squares_RM == 0, np.float32(1), squares_RM)
    return blocks, np.where(squares_RM == 0, np.float32(0), fitted_RM), zero_RM.astype(np.uint8)


def _divisor(scale_RM: np.ndarray) -> np.ndarray:
    """1 where all values of a block are zero."""
    return np.where(scale_RM == 0, np.float32(1), scale_RM)


def packed_bits(q: np.ndarray, bits: int) -> np.ndarray:
    """Integers of ``bits`` bits, uint8 ``[..., X]``, as bytes ``[..., ceil(X * bits / 8)]``."""
    if bits == 8:
        return q
    if q.shape[-1] % 2:
        q = np.concatenate([q, np.zeros_like(q[..., :1])], axis=-1)
    low, high = q[..., ::2], q[..., 1::2]
    return np.asarray(low | (high << 4), dtype=np.uint8)


def unpacked(blocks: np.ndarray, bits: int) -> np.ndarray:
    """The integers in ``packed_bits``, and a zero more if they were an odd number."""
    if bits == 8:
        return blocks
    return np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], -1)
