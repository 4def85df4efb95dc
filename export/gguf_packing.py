"""Blocks of GGUF files, in the layout that ONNX Runtime reads: the same values, not rounded again.

Formats (ggml, "ggml-quants"): a block has a scale d in fp16, and 32 integers q. Q4_0: d * (q - 8). Q4_1: d * q + m, with m in
fp16. Q8_0: d * q. Of 4 bits, the first 16 integers are the low halves of 16 bytes, the others their high halves. Q4_K: of 256
values, 8 blocks with scales d * s and minima -d_min * m, with s and m of 6 bits. Q6_K: of 256 values, 16 blocks of 6 bits with
scales d * s, with s of 8 bits.
"""

from collections.abc import Callable

import numpy as np

from trt_kv.export.checkpoints.base import QuantizedBlocks
from trt_kv.export.packing import PackedMatrix, packed_bits
from trt_kv.weight_index import BlockFormat

_MIDDLE = np.float32(8)
"""The zero point of 4-bit integers where none are stored."""


def packed_blocks(stored: QuantizedBlocks) -> PackedMatrix:
    """The matrix of ``stored``, whose scheme is one of ``FORMATS``.

    Its values are those of ``stored`` exactly, but for minima: they become offsets of ``m + 8 * d``, which are exact unless
    the exponents of m and d differ by more than 12, and then rounded to fp32.
    """
    return _READERS[stored.scheme](stored.blocks)


def _q4_0(blocks: np.ndarray) -> PackedMatrix:
    return PackedMatrix(bits=4, block_size=32, blocks=_halves(blocks[..., 2:]), scales=_floats(blocks[..., :2]))


def _q4_1(blocks: np.ndarray) -> PackedMatrix:
    scales, minima = _floats(blocks[..., :2]), _floats(blocks[..., 2:4])
    return PackedMatrix(
        bits=4, block_size=32, blocks=_halves(blocks[..., 4:]), scales=scales, offsets=minima + _MIDDLE * scales
    )


def _q8_0(blocks: np.ndarray) -> PackedMatrix:
    return PackedMatrix(bits=8, block_size=32, blocks=blocks[..., 2:] ^ np.uint8(128), scales=_floats(blocks[..., :2]))


def _q4_k(blocks: np.ndarray) -> PackedMatrix:
    """``[N, M / 8, 144]``: d, d_min, twelve bytes of s and m, and four times 32 bytes of two blocks, low halves first."""
    n_rows, n_groups, _ = blocks.shape
    d, d_min = _floats(blocks[..., :2]), _floats(blocks[..., 2:4])
    low, high, last = np.split(blocks[..., 4:16], 3, axis=-1)
    s = np.concatenate([low & 63, (last & 15) | ((low >> 6) << 4)], axis=-1).astype(np.float32)
    m = np.concatenate([high & 63, (last >> 4) | ((high >> 6) << 4)], axis=-1).astype(np.float32)
    scales, minima = d[..., None] * s, -(d_min[..., None] * m)
    pairs = blocks[..., 16:].reshape(n_rows, n_groups, 4, 32)
    q = np.stack([pairs & 15, pairs >> 4], axis=-2).reshape(n_rows, n_groups * 8, 32)
    return PackedMatrix(
        bits=4,
        block_size=32,
        blocks=packed_bits(q, 4),
        scales=scales.reshape(n_rows, -1),
        offsets=(minima + _MIDDLE * scales).reshape(n_rows, -1),
    )


def _q6_k(blocks: np.ndarray) -> PackedMatrix:
    """``[N, M / 16, 210]``: twice 64 bytes of four low bits, twice 32 of two high bits, 16 bytes of s, and d."""
    n_rows, n_groups, _ = blocks.shape
    low = blocks[..., :128].reshape(n_rows, n_groups, 2, 1, 64)
    high = blocks[..., 128:192].reshape(n_rows, n_groups, 2, 1, 32)
    low = np.concatenate([low & 15, low >> 4], axis=-2).reshape(n_rows, n_groups, 2, 4, 32)
    high = np.concatenate([(high >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-2)
    q = (low | (high << 4)) + np.uint8(128 - 32)
    s = np.ascontiguousarray(blocks[..., 192:208]).view(np.int8).astype(np.float32)
    return PackedMatrix(
        bits=8,
        block_size=16,
        blocks=q.reshape(n_rows, -1, 16),
        scales=(_floats(blocks[..., 208:])[..., None] * s).reshape(n_rows, -1),
    )


def _halves(bytes_NMS: np.ndarray) -> np.ndarray:
    """The integers in the low halves, then those in the high halves, packed in that order."""
    return packed_bits(np.concatenate([bytes_NMS & 15, bytes_NMS >> 4], axis=-1), 4)


def _floats(halves: np.ndarray) -> np.ndarray:
    """fp16 in pairs of bytes ``[..., 2]``, as fp32 ``[...]``."""
    return np.ascontiguousarray(halves).view("<f2")[..., 0].astype(np.float32)


_READERS: dict[str, Callable[[np.ndarray], PackedMatrix]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q4_k": _q4_k,
    "q6_k": _q6_k,
    "q8_0": _q8_0,
}

FORMATS = {
    "q4_0": BlockFormat(bits=4, block_size=32, zero_points=False, offsets=False),
    "q4_1": BlockFormat(bits=4, block_size=32, zero_points=False, offsets=True),
    "q4_k": BlockFormat(bits=4, block_size=32, zero_points=False, offsets=True),
    "q6_k": BlockFormat(bits=8, block_size=16, zero_points=False, offsets=False),
    "q8_0": BlockFormat(bits=8, block_size=32, zero_points=False, offsets=False),
}
"""How matrices of these schemes are packed."""
USUAL_BLOCK_SIZE = 32
"""The block size to ask for to get them."""
