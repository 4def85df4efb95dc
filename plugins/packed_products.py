"""Products of rows with matrices in blocks of small integers, on the CPU, whose activations are rounded to int8.

``y[r, n] = bias[n] + sum over units u of (a[r, u] * s[n, u]) * dot[r, n, u] + c[n, u] * sum[r, u]``, where a unit is 32 values,
or 16 in blocks of 16; a is the scale of the activations, s that of the weights, dot the product of the integers, c the offset
minus s times the zero point, and sum the sum of the rounded activations. Each addend is added by one fused operation; units are
summed in ``LANES`` chains (u, u + 8, u + 16 ...), and the chains by a fixed tree. So a row has the same bits in any number of
rows, with any number of threads, on any processor.
"""

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.jit import njit
from trt_kv.plugins.packed_weights import (
    BIAS,
    BLOCK_SIZE,
    BLOCKS,
    N_BITS,
    N_BLOCKS,
    N_COLUMNS,
    OFFSETS,
    SCALES,
    ZERO_POINTS,
)
from trt_kv.plugins.paging import Floats, Ints
from trt_kv.plugins.vector_integers import bytes_at, floats_at, fused

UNIT = 32
"""Activations that share a scale."""
LANES = 8
PADDED = UNIT * LANES
"""Rounded rows are filled up with zeros to a multiple of it."""
SMALLEST = np.float32(1e-36)
"""Activations whose largest in a unit is smaller count as zeros: the quotient 127 / largest would overflow."""
TO_WHOLE = np.float32(3 * 2.0**22)
"""Added and taken away again, it leaves the nearest integer, ties to even."""


class RoundedRows(NamedTuple):
    """Rows of activations in int8, and what products need of them.

    ``values``: int8 [R, 2, K filled up]; in [r, 0] in order, in [r, 1] of each 64 first those at even places. ``scales``: fp32
    [R, K / 32] filled up; ``sums`` and ``half_sums``: of each 32 and 16 values times their scale. They may have more rows, and
    longer ones, than are used.
    """

    values: NDArray[np.int8]
    scales: Floats
    sums: Floats
    half_sums: Floats


def rounded_rows(n_rows: int, n_inputs: int) -> RoundedRows:
    """Memory for rows of up to ``n_inputs`` activations."""
    n_units = -(-n_inputs // PADDED) * LANES
    return RoundedRows(
        values=np.zeros((n_rows, 2, n_units * UNIT), np.int8),
        scales=np.zeros((n_rows, n_units), np.float32),
        sums=np.zeros((n_rows, n_units), np.float32),
        half_sums=np.zeros((n_rows, 2 * n_units), np.float32),
    )


@njit(parallel=True)
def round_activations(x_RK: Floats, rounded: RoundedRows) -> None:
    """Round rows to int8, each unit to its largest value / 127. A unit that is not finite becomes NaN as a whole."""
    values, scales, sums, half_sums = rounded
    if len(x_RK) < 8:
        for r in range(len(x_RK)):
            _round_row(x_RK[r], values[r], scales[r], sums[r], half_sums[r])
    else:
        for r in numba.prange(len(x_RK)):
            _round_row(x_RK[r], values[r], scales[r], sums[r], half_sums[r])


@njit()
def _round_row(x_K: Floats, values_2K: NDArray[np.int8], scales_U: Floats, sums_U: Floats, half_sums_H: Floats) -> None:
    bits_K = x_K.view(np.int32)
    for u in range((len(x_K) + PADDED - 1) // PADDED * LANES):
        first = u * UNIT
        n = max(0, min(UNIT, len(x_K) - first))
        top_bits = np.int32(0)
        for i in range(first, first + n):
            top_bits = max(top_bits, bits_K[i] & np.int32(0x7FFFFFFF))
        top = np.int32(top_bits).view(np.float32)
        is_zero, is_finite = top < SMALLEST, top_bits < np.int32(0x7F800000)
        scale = np.float32(0.0) if is_zero else top / np.float32(127.0)
        if not is_finite:
            scale = np.float32(np.nan)
        inverse = np.float32(127.0) / top if is_finite and not is_zero else np.float32(0.0)
        total = 0
        for half in range(2):
            half_total = 0
            for i in range(half * UNIT // 2, (half + 1) * UNIT // 2):
                q = np.int8(0)
                if i < n and is_finite:
                    q = np.int8((x_K[first + i] * inverse + TO_WHOLE) - TO_WHOLE)
                place = first + i
                values_2K[0, place] = q
                values_2K[1, place // 64 * 64 + place % 2 * 32 + place % 64 // 2] = q
                half_total += int(q)
            half_sums_H[2 * u + half] = np.float32(half_total) * scale
            total += half_total
        sums_U[u] = np.float32(total) * scale
        scales_U[u] = scale


@njit(parallel=True)
def multiply_packed(rounded: RoundedRows, table: Ints, first: int, count: int, out: Floats) -> None:
    """The products of ``len(out)`` rounded rows with the matrices ``first`` to ``first + count - 1`` of a ``weight_table``.

    ``out``: fp32 [R, N of all of them], one matrix's columns after the other's, contiguous rows.
    """
    n_columns = 0
    for i in range(first, first + count):
        n_columns += table[i, N_COLUMNS]
    for column in numba.prange(n_columns):
        matrix, n = _place(table, first, np.int64(column))
        for r in range(len(out)):
            out[r, column] = _product(rounded, r, table[matrix], n)


@njit()
def _place(table: Ints, matrix: int, column: int) -> tuple[int, int]:
    """The matrix that a column of the output belongs to, and its number there."""
    while column >= table[matrix, N_COLUMNS]:
        column -= table[matrix, N_COLUMNS]
        matrix += 1
    return matrix, column


@njit()
def _product(rounded: RoundedRows, r: int, weights: Ints, n: int) -> np.float32:
    n_blocks, size, bits = weights[N_BLOCKS], weights[BLOCK_SIZE], weights[N_BITS]
    unit = min(UNIT, size)
    x_K = rounded.values[r, 0]
    sums_U = rounded.sums[r] if unit == UNIT else rounded.half_sums[r]
    blocks = bytes_at(weights[BLOCKS], weights[N_COLUMNS] * n_blocks * size * bits // 8)
    scales = floats_at(weights[SCALES], weights[N_COLUMNS] * n_blocks)
    chains = np.zeros(LANES, np.float32)
    for u in range(n_blocks * size // unit):
        block = n * n_blocks + u * unit // size
        dot = np.int32(0)
        for i in range(unit):
            place = n * n_blocks * size + u * unit + i
            dot += _integer(blocks, place, bits) * np.int32(x_K[u * unit + i])
        zero = np.float32(_zero_point(weights, n, u * unit // size))
        offset = np.float32(0.0)
        if weights[OFFSETS] != 0:
            offset = floats_at(weights[OFFSETS], block + 1)[block]
        correction = fused(-scales[block], zero, offset)
        total = fused(rounded.scales[r, u * unit // UNIT] * scales[block], np.float32(dot), chains[u % LANES])
        chains[u % LANES] = fused(correction, sums_U[u], total)
    for step in (4, 2, 1):
        for lane in range(step):
            chains[lane] += chains[lane + step]
    if weights[BIAS] != 0:
        chains[0] += floats_at(weights[BIAS], n + 1)[n]
    product: np.float32 = chains[0]
    return product


@njit()
def _zero_point(weights: Ints, n: int, block: int) -> np.int32:
    bits = weights[N_BITS]
    if weights[ZERO_POINTS] == 0:
        return np.int32(1 << (bits - 1))
    n_bytes = (weights[N_BLOCKS] * bits + 7) // 8
    zeros = bytes_at(weights[ZERO_POINTS] + n * n_bytes, n_bytes)
    zero: np.int32 = _integer(zeros, block, bits)
    return zero


@njit()
def _integer(packed: NDArray[np.uint8], place: int, bits: int) -> np.int32:
    if bits == 8:
        return np.int32(packed[place])
    return np.int32((packed[place // 2] >> (place % 2 * 4)) & 15)


@njit(parallel=True)
def gather_packed(table: Ints, matrix: int, ids_R: Ints, out_RK: Floats) -> None:
    """Rows ``ids_R`` of a matrix of a ``weight_table``, each operation of ``scale * (q - zero) + offset`` rounded to fp32."""
    weights = table[matrix]
    n_blocks, size, bits = weights[N_BLOCKS], weights[BLOCK_SIZE], weights[N_BITS]
    block_bytes = size * bits // 8
    for r in numba.prange(len(ids_R)):
        n = ids_R[r]
        scales = floats_at(weights[SCALES] + 4 * n * n_blocks, n_blocks)
        blocks = bytes_at(weights[BLOCKS] + n * n_blocks * block_bytes, n_blocks * block_bytes)
        for block in range(n_blocks):
            scale, zero = scales[block], _zero_point(weights, n, block)
            offset = np.float32(0.0)
            if weights[OFFSETS] != 0:
                offset = floats_at(weights[OFFSETS] + 4 * n * n_blocks, n_blocks)[block]
            for i in range(size):
                place = block * size + i
                out_RK[r, place] = scale * np.float32(_integer(blocks, place, bits) - zero) + offset
