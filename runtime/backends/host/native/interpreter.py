"""Runs a segment of ``program.py`` in one call of compiled code (numba), the same for all engines.

Operations between two products are done some rows at a time, by each thread for its rows: what a row's next operation reads is
still in the cache. Buffers are at addresses, so that memory of any kind takes no other code.
"""

from typing import Any

import numba
import numpy as np

from trt_kv.plugins.jit import njit
from trt_kv.plugins.packed_products import RoundedRows, gather_packed, multiply_packed
from trt_kv.plugins.paging import Floats, Ints
from trt_kv.plugins.vector_memory import row_at, rows_at
from trt_kv.plugins.vector_rounding import round_row
from trt_kv.runtime.backends.host.native.layout import ARRAY, BEGIN, ROW_BYTES, WIDTH
from trt_kv.runtime.backends.host.native.ops import Activation, Array, Op
from trt_kv.runtime.backends.host.native.rows import (
    LANES,
    add,
    cap,
    copy,
    gate_by_gelu,
    gate_by_silu,
    normalize,
    rotate,
)

ROWS_AT_A_TIME = 4
EMBED, TAKE, COPY, NORMALIZE, ROTATE, GATE, ADD, SCALE, CAP, ROUND, MULTIPLY = (int(op) for op in Op)
ARENA, ROTATIONS, LOGITS, PORTS, ATTENDED = (int(array) for array in Array)
N_ARRAYS = len(Array)
GELU_TANH = int(Activation.GELU_TANH)


@njit()
def run_segment(
    ops: Ints,
    n_rows: int,
    frame: Ints,
    constants: Floats,
    matrices: Ints,
    input_ids: Ints,
    logit_rows: Ints,
    rounded: RoundedRows,
    arena: Floats,
    rotations: Floats,
    logits_RV: Floats,
    ports: Floats,
    attended_NHD: Floats,
) -> None:
    """Run ``ops`` on ``n_rows`` rows: the step's tokens, or those that need logits.

    ``frame``: see ``Layout.frame``, of the last five arguments, which are those of ``Array``. ``matrices``: see
    ``weight_table``. ``rounded``: memory for the activations that products read.
    """
    arrays = np.empty(N_ARRAYS, np.int64)
    arrays[ARENA], arrays[ROTATIONS], arrays[LOGITS] = arena.ctypes.data, rotations.ctypes.data, logits_RV.ctypes.data
    arrays[PORTS], arrays[ATTENDED] = ports.ctypes.data, attended_NHD.ctypes.data
    at = 0
    while at < len(ops):
        end = at
        while end < len(ops) and ops[end, 0] != MULTIPLY and ops[end, 0] != EMBED:
            end += 1
        if end > at and n_rows <= ROWS_AT_A_TIME:
            _run_rows(ops[at:end], 0, n_rows, frame, arrays, constants, logit_rows, rounded)
        elif end > at:
            _run_all_rows(ops[at:end], n_rows, frame, arrays, constants, logit_rows, rounded)
        if end < len(ops):
            op = ops[end]
            if op[0] == EMBED:
                gather_packed(matrices, op[1], input_ids, _rows(frame, arrays, op[2], n_rows))
            else:
                multiply_packed(rounded, matrices, op[1], op[2], _rows(frame, arrays, op[3], n_rows))
        at = end + 1


@njit(parallel=True)
def _run_all_rows(
    ops: Ints, n_rows: int, frame: Ints, arrays: Ints, constants: Floats, logit_rows: Ints, rounded: RoundedRows
) -> None:
    for i in numba.prange((n_rows + ROWS_AT_A_TIME - 1) // ROWS_AT_A_TIME):
        first = i * ROWS_AT_A_TIME
        end = min(first + ROWS_AT_A_TIME, n_rows)
        _run_rows(ops, first, end, frame, arrays, constants, logit_rows, rounded)


@njit()
def _run_rows(
    ops: Ints, first: int, end: int, frame: Ints, arrays: Ints, constants: Floats, logit_rows: Ints, rounded: RoundedRows
) -> None:
    """Run ``ops`` on the rows from ``first`` to ``end``."""
    lanes = np.empty(LANES, np.float32)
    for i in range(len(ops)):
        op = ops[i]
        for row in range(first, end):
            _run_row(op, row, frame, arrays, constants, logit_rows, rounded, lanes)


@njit()
def _run_row(
    op: Ints,
    row: int,
    frame: Ints,
    arrays: Ints,
    constants: Floats,
    logit_rows: Ints,
    rounded: RoundedRows,
    lanes: Floats,
) -> None:
    code = op[0]
    if code == TAKE:
        copy(_row(frame, arrays, op[1], logit_rows[row]), _row(frame, arrays, op[2], row))
        return
    a = _row(frame, arrays, op[1], row)
    if code == ROUND:
        x, this = rows_at(_address(frame, arrays, op[1], row), 1, len(a)), slice(row, row + 1)
        round_row(x, 0, rounded.values[this], rounded.scales[this], rounded.sums[this], rounded.half_sums[this])
    elif code == SCALE:
        a *= constants[op[2]]
    elif code == CAP:
        cap(a, constants[op[2]])
    else:
        b = _row(frame, arrays, op[2], row)
        if code == COPY:
            copy(a, b)
        elif code == ADD:
            add(a, b, constants[op[3]])
        elif code == NORMALIZE:
            weight, eps, width = constants[op[3] : op[3] + op[5]], constants[op[4]], op[5]
            for at in range(0, len(a), width):
                normalize(a[at : at + width], weight, eps, lanes, b[at : at + width])
        elif code == ROTATE:
            cos, sin, width = _row(frame, arrays, op[4], row), _row(frame, arrays, op[5], row), op[3]
            for at in range(0, len(a), width):
                rotate(a[at : at + width], cos, sin, b[at : at + width])
        elif op[3] == GELU_TANH:
            gate_by_gelu(a, b)
        else:
            gate_by_silu(a, b)


@njit()
def _address(frame: Ints, arrays: Ints, buffer: int, row: int) -> int:
    return int(arrays[frame[buffer, ARRAY]] + frame[buffer, BEGIN] + row * frame[buffer, ROW_BYTES])


@njit()
def _row(frame: Ints, arrays: Ints, buffer: int, row: int) -> Any:
    return row_at(_address(frame, arrays, buffer, row), frame[buffer, WIDTH])


@njit()
def _rows(frame: Ints, arrays: Ints, buffer: int, n_rows: int) -> Any:
    """The first rows of a buffer that is not a part of another."""
    return rows_at(_address(frame, arrays, buffer, 0), n_rows, frame[buffer, WIDTH])
