"""Products of rows with matrices in blocks of small integers, on the CPU, whose activations are rounded to int8.

``y[r, n] = bias[n] + sum over units u of (a[r, u] * s[n, u]) * dot[r, n, u] + c[n, u] * sum[r, u]``, where a unit is 32 values,
or 16 in blocks of 16; a is the scale of the activations, s that of the weights, dot the product of the integers, c the offset
minus s times the zero point, and sum the sum of the rounded activations. Each addend is added by one fused operation; units are
summed in ``LANES`` chains (u, u + 8, u + 16 ...), and the chains by a fixed tree. So a row has the same bits in any number of
rows, with any number of threads, on any processor.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.jit import njit
from trt_kv.plugins.packed_weights import BLOCK_SIZE, BLOCKS, N_BITS, N_BLOCKS, N_COLUMNS, OFFSETS, SCALES, ZERO_POINTS
from trt_kv.plugins.paging import Floats, Ints
from trt_kv.plugins.vector_integers import LANES, byte_at, float_at
from trt_kv.plugins.vector_packed_rows import FEW, UNIT, multiply_columns
from trt_kv.plugins.vector_packed_tiles import TILE_COLUMNS, UNIT_BYTES, UNIT_FLOATS, multiply_tile, unpack_tile
from trt_kv.plugins.vector_rounding import PADDED, round_row

TASKS, LEAST_COLUMNS, MOST_COLUMNS = 32, 8, 64
"""Tasks if there are few rows, and columns of a task: one costs as much as some columns, few cannot be shared out evenly.
They do not depend on the number of threads, which numba does not tell to code that it caches.
"""
LOT_ROWS = 128
"""Rows that a tile is unpacked for."""
LOT_ROUNDED = 8
"""From so many rows on, they are rounded in parallel."""


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
    if len(x_RK) < LOT_ROUNDED:
        for r in range(len(x_RK)):
            round_row(x_RK, r, values, scales, sums, half_sums)
    else:
        for r in numba.prange(len(x_RK)):
            round_row(x_RK, np.int64(r), values, scales, sums, half_sums)


@njit(parallel=True)
def multiply_packed(rounded: RoundedRows, table: Ints, first: int, count: int, out: Floats) -> None:
    """The products of ``len(out)`` rounded rows with the matrices ``first`` to ``first + count - 1`` of a ``weight_table``.

    ``out``: fp32 [R, N of all of them], one matrix's columns after the other's, contiguous rows.
    """
    n_columns = 0
    for i in range(first, first + count):
        n_columns += table[i, N_COLUMNS]
    if len(out) <= FEW:
        size = min(max(n_columns // TASKS, LEAST_COLUMNS), MOST_COLUMNS)
        for task in numba.prange((n_columns + size - 1) // size):
            begin = np.int64(task) * size
            _multiply_range(rounded, table, first, begin, min(begin + size, n_columns), out)
    else:
        n_tiles = 0
        for i in range(first, first + count):
            n_tiles += _tiles(table, i)
        n_lots = (len(out) + LOT_ROWS - 1) // LOT_ROWS
        for task in numba.prange(n_lots * n_tiles):
            row = np.int64(task) // n_tiles * LOT_ROWS
            _multiply_lot(rounded, table, first, np.int64(task) % n_tiles, row, min(LOT_ROWS, len(out) - row), out)


@njit()
def _tiles(table: Ints, matrix: int) -> int:
    n_tiles: int = (table[matrix, N_COLUMNS] + TILE_COLUMNS - 1) // TILE_COLUMNS
    return n_tiles


@njit()
def _multiply_lot(rounded: RoundedRows, table: Ints, matrix: int, tile: int, row: int, n_rows: int, out: Floats) -> None:
    """A tile of columns times a lot of rows. The last tile of a matrix begins so that it is whole."""
    values, scales, sums, half_sums = rounded
    first = 0
    while tile >= _tiles(table, matrix):
        tile -= _tiles(table, matrix)
        first += table[matrix, N_COLUMNS]
        matrix += 1
    n_columns = table[matrix, N_COLUMNS]
    if n_columns < TILE_COLUMNS:
        for some in range(row, row + n_rows, FEW):
            n = min(FEW, row + n_rows - some)
            multiply_columns(values, scales, sums, half_sums, some, n, table, matrix, 0, n_columns, out, first)
        return
    column = min(tile * TILE_COLUMNS, n_columns - TILE_COLUMNS)
    n_units = table[matrix, N_BLOCKS] * table[matrix, BLOCK_SIZE] // min(table[matrix, BLOCK_SIZE], UNIT)
    unpacked, factors = np.empty(n_units * UNIT_BYTES, np.uint8), np.empty(n_units * UNIT_FLOATS, np.float32)
    unpack_tile(table, matrix, column, unpacked, factors)
    multiply_tile(values, scales, sums, half_sums, row, n_rows, table, matrix, column, unpacked, factors, out, first + column)


@njit()
def _multiply_range(rounded: RoundedRows, table: Ints, matrix: int, begin: int, end: int, out: Floats) -> None:
    """Columns ``begin`` to ``end`` of the output."""
    values, scales, sums, half_sums = rounded
    first = 0
    while first < end:
        column = max(begin - first, 0)
        n = min(end - first, table[matrix, N_COLUMNS]) - column
        for row in range(0, len(out) if n > 0 else 0, FEW):
            n_rows = min(FEW, len(out) - row)
            multiply_columns(values, scales, sums, half_sums, row, n_rows, table, matrix, column, n, out, first + column)
        first += table[matrix, N_COLUMNS]
        matrix += 1


@njit()
def _zero_point(weights: Ints, n: int, block: int) -> Any:
    bits = weights[N_BITS]
    if weights[ZERO_POINTS] == 0:
        return 1 << (bits - 1)
    return _integer(weights[ZERO_POINTS] + n * ((weights[N_BLOCKS] * bits + 7) // 8), block, bits)


@njit()
def _integer(packed: int, place: int, bits: int) -> Any:
    """One of the integers from an address on."""
    if bits == 8:
        return np.int64(byte_at(packed, place))
    return np.int64((byte_at(packed, place // 2) >> (place % 2 * 4)) & 15)


@njit(parallel=True)
def gather_packed(table: Ints, matrix: int, ids_R: Ints, out_RK: Floats) -> None:
    """Rows ``ids_R`` of a matrix of a ``weight_table``, each operation of ``scale * (q - zero) + offset`` rounded to fp32."""
    weights = table[matrix]
    n_blocks, size, bits = weights[N_BLOCKS], weights[BLOCK_SIZE], weights[N_BITS]
    for r in numba.prange(len(ids_R)):
        n = ids_R[r]
        blocks = weights[BLOCKS] + n * n_blocks * (size * bits // 8)
        for block in range(n_blocks):
            scale, zero = float_at(weights[SCALES], n * n_blocks + block), _zero_point(weights, n, block)
            offset = np.float32(0.0)
            if weights[OFFSETS] != 0:
                offset = float_at(weights[OFFSETS], n * n_blocks + block)
            for place in range(block * size, (block + 1) * size):
                out_RK[r, place] = scale * np.float32(_integer(blocks, place, bits) - zero) + offset
