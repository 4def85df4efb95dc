"""Runs a segment of ``program.py`` in one call of compiled code (numba), the same for all engines.

Operations between two products are done row by row, each thread some rows: what a row's next operation reads is still in the cache.
"""

from typing import Any, NamedTuple

import numba
import numpy as np

from trt_kv.plugins.jit import njit
from trt_kv.plugins.packed_products import PackedWeights, gather_packed, multiply_packed, round_activations
from trt_kv.plugins.paging import Floats, Ints
from trt_kv.runtime.backends.host.native.matrices import COLUMNS
from trt_kv.runtime.backends.host.native.ops import Activation, Op
from trt_kv.runtime.backends.host.native.program import ARENA, ATTENDED, PORTS
from trt_kv.runtime.backends.host.native.rows import (
    LANES,
    cap,
    gate_by_gelu,
    gate_by_silu,
    multiply_fp32,
    normalize,
    rotate,
)

ROWS_AT_A_TIME = 8
EMBED, TAKE, NORMALIZE, ROTATE, GATE, ADD, SCALE, CAP, ROUND, MULTIPLY_FP32, MULTIPLY = (int(op) for op in Op)
GELU = int(Activation.GELU_TANH)
BITS, BLOCK_SIZE, N_ROWS, N_COLUMNS, BLOCKS, SCALES, ZERO_POINTS, OFFSETS, BIAS = range(len(COLUMNS))


class Model(NamedTuple):
    """Of one engine: see ``DenseProgram`` and ``Weights``."""

    buffers: Ints
    matrices: Ints
    mapped: Any
    constants: Floats


class Step(NamedTuple):
    """Of one step: its tokens, the rows that need logits, cosines and sines ``[ropes, 2, N, pairs]``, and memory.

    ``arena`` holds the columns of buffers one after the other, each with a row per token. ``rounded``, ``scales`` and ``sums``:
    the activations that products read, see ``round_activations``.
    """

    input_ids: Ints
    logit_rows: Ints
    rotations: Floats
    arena: Floats
    rounded: Any
    scales: Floats
    sums: Floats


class External(NamedTuple):
    """The caller's arrays, flat: where q, k and v are written, what attention returned, the logits."""

    ports: Floats
    attended: Floats
    logits: Floats


@njit()
def run_segment(ops: Ints, n_rows: int, model: Model, step: Step, external: External) -> None:
    """Run ``ops`` on ``n_rows`` rows: the step's tokens, or those that need logits."""
    at = 0
    while at < len(ops):
        end = at
        while end < len(ops) and ops[end, 0] != MULTIPLY:
            end += 1
        if n_rows <= ROWS_AT_A_TIME:
            _run_rows(ops[at:end], 0, n_rows, model, step, external)
        else:
            _run_all_rows(ops[at:end], n_rows, model, step, external)
        if end < len(ops):
            _multiply(ops[end], n_rows, model, step, external)
        at = end + 1


@njit(parallel=True)
def _run_all_rows(ops: Ints, n_rows: int, model: Model, step: Step, external: External) -> None:
    for i in numba.prange((n_rows + ROWS_AT_A_TIME - 1) // ROWS_AT_A_TIME):
        first = i * ROWS_AT_A_TIME
        _run_rows(ops, first, min(first + ROWS_AT_A_TIME, n_rows), model, step, external)


@njit()
def _run_rows(ops: Ints, first: int, end: int, model: Model, step: Step, external: External) -> None:
    """Run ``ops`` on the rows from ``first`` to ``end``."""
    lanes = np.empty(LANES, np.float32)
    for i in range(len(ops)):
        op = ops[i]
        code = op[0]
        if code == EMBED:
            _embed(op, first, end, model, step, external)
            continue
        a = _values(op[1], model, step, external)
        if code == TAKE:
            taken = _values(op[2], model, step, external)
            for row in range(first, end):
                taken[row] = a[step.logit_rows[row]]
        elif code == NORMALIZE:
            out, eps, width = _values(op[2], model, step, external), model.constants[op[4]], op[5]
            weight = model.constants[op[3] : op[3] + width]
            for row in range(first, end):
                for at in range(0, a.shape[1], width):
                    normalize(a[row, at : at + width], weight, eps, lanes, out[row, at : at + width])
        elif code == ROTATE:
            width = a.shape[1] // op[2]
            for row in range(first, end):
                for at in range(0, a.shape[1], width):
                    rotate(a[row, at : at + width], step.rotations[op[3], 0, row], step.rotations[op[3], 1, row])
        elif code == GATE:
            up = _values(op[2], model, step, external)
            for row in range(first, end):
                if op[3] == GELU:
                    gate_by_gelu(a[row], up[row])
                else:
                    gate_by_silu(a[row], up[row])
        elif code == ADD:
            addend, factor = _values(op[2], model, step, external), model.constants[op[3]]
            for row in range(first, end):
                a[row] += factor * addend[row]
        elif code == SCALE:
            a[first:end] *= model.constants[op[2]]
        elif code == CAP:
            for row in range(first, end):
                cap(a[row], model.constants[op[2]])
        elif code == ROUND:
            values, scales, sums = _rounded(a.shape[1], op[2], step)
            round_activations(a[first:end], op[2], values[first:end], scales[first:end], sums[first:end])
        elif code == MULTIPLY_FP32:
            matrix, out = model.matrices[op[2]], _values(op[3], model, step, external)
            weights, bias = _fp32_matrix(matrix, model), _bias(matrix, model)
            for row in range(first, end):
                multiply_fp32(a[row], weights, bias, out[row])


@njit()
def _embed(op: Ints, first: int, end: int, model: Model, step: Step, external: External) -> None:
    matrix, out = model.matrices[op[1]], _values(op[2], model, step, external)
    if matrix[BITS] == 32:
        weights_fp32 = _fp32_matrix(matrix, model)
        for row in range(first, end):
            out[row] = weights_fp32[step.input_ids[row]]
    else:
        weights = _packed_matrix(matrix, model)
        for row in range(first, end):
            gather_packed(weights, step.input_ids[row], out[row])


@njit()
def _multiply(op: Ints, n_rows: int, model: Model, step: Step, external: External) -> None:
    for i in range(op[2]):
        matrix, out = model.matrices[op[3 + 2 * i]], _values(op[4 + 2 * i], model, step, external)
        values, scales, sums = _rounded(matrix[N_COLUMNS], matrix[BLOCK_SIZE], step)
        multiply_packed(values[:n_rows], scales[:n_rows], sums[:n_rows], _packed_matrix(matrix, model), out[:n_rows])


@njit()
def _values(buffer: int, model: Model, step: Step, external: External) -> Floats:
    """``[rows, columns]`` of a buffer."""
    array, first, width = model.buffers[buffer]
    if array == ARENA:
        flat, n_rows = step.arena, max(len(step.input_ids), len(step.logit_rows))
    elif array == PORTS:
        flat, n_rows = external.ports, len(step.input_ids)
    elif array == ATTENDED:
        flat, n_rows = external.attended, len(step.input_ids)
    else:
        flat, n_rows = external.logits, len(step.logit_rows)
    return flat[first * n_rows : (first + width) * n_rows].reshape(n_rows, width)


@njit()
def _rounded(n_columns: int, block_size: int, step: Step) -> tuple[Any, Floats, Floats]:
    """Memory for a step's rounded rows, their scales and sums."""
    n_rows, n_blocks = max(len(step.input_ids), len(step.logit_rows)), n_columns // block_size
    return (
        step.rounded[: n_rows * n_columns].reshape(n_rows, n_columns),
        step.scales[: n_rows * n_blocks].reshape(n_rows, n_blocks),
        step.sums[: n_rows * n_blocks].reshape(n_rows, n_blocks),
    )


@njit()
def _packed_matrix(matrix: Ints, model: Model) -> PackedWeights:
    n, n_blocks = matrix[N_ROWS], matrix[N_COLUMNS] // matrix[BLOCK_SIZE]
    n_bytes = matrix[BLOCK_SIZE] * matrix[BITS] // 8
    n_zeros = 0 if matrix[ZERO_POINTS] < 0 else (n_blocks * matrix[BITS] + 7) // 8
    return PackedWeights(
        matrix[BITS],
        matrix[BLOCK_SIZE],
        model.mapped[matrix[BLOCKS] : matrix[BLOCKS] + n * n_blocks * n_bytes].reshape(n, n_blocks, n_bytes),
        _mapped_floats(matrix[SCALES], n, n_blocks, model),
        model.mapped[max(0, matrix[ZERO_POINTS]) : max(0, matrix[ZERO_POINTS]) + n * n_zeros].reshape(n, n_zeros),
        _mapped_floats(matrix[OFFSETS], n, n_blocks, model),
        _bias(matrix, model),
    )


@njit()
def _mapped_floats(at: int, n_rows: int, n_columns: int, model: Model) -> Floats:
    """``[n_rows, 0]`` if ``at`` is -1."""
    if at < 0:
        at, n_columns = 0, 0
    return model.mapped[at : at + 4 * n_rows * n_columns].view(np.float32).reshape(n_rows, n_columns)


@njit()
def _fp32_matrix(matrix: Ints, model: Model) -> Floats:
    n, n_columns = matrix[N_ROWS], matrix[N_COLUMNS]
    return model.constants[matrix[BLOCKS] : matrix[BLOCKS] + n * n_columns].reshape(n, n_columns)


@njit()
def _bias(matrix: Ints, model: Model) -> Floats:
    """Empty if there is none."""
    n = 0 if matrix[BIAS] < 0 else matrix[N_ROWS]
    return model.constants[max(0, matrix[BIAS]) : max(0, matrix[BIAS]) + n]
