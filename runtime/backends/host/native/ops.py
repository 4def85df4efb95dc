"""Operations on the rows of a step: what the segments of ``program.py`` are lists of, and what ``interpreter.py`` runs.

An operation is a row of integers: a code, the buffers that it reads and writes, and numbers whose meaning depends on the code.
Each row of a buffer is computed from the same row of others alone, so it does not depend on the number of rows.
"""

from enum import IntEnum


class Op(IntEnum):
    """Codes, and the integers behind them. A weight or a number of fp32 is its place among the constants."""

    EMBED = 0
    """[matrix, out]: the rows of a matrix that the step's tokens are."""
    TAKE = 1
    """[source, out]: the rows that need logits."""
    COPY = 2
    """[source, out]."""
    NORMALIZE = 3
    """[source, out, weight, eps, width]: RMSNorm of each ``width`` columns (Zhang and Sennrich 2019, equation 4)."""
    ROTATE = 4
    """[source, out, head size, cosines, sines]: channel d with channel d + the number of pairs of every head."""
    GATE = 5
    """[gate, up, activation]: ``gate = activation(gate) * up``, by an ``Activation``."""
    ADD = 6
    """[sum, addend, factor]: ``sum += factor * addend``."""
    SCALE = 7
    """[buffer, factor]."""
    CAP = 8
    """[buffer, cap]: ``cap * tanh(x / cap)``."""
    ROUND = 9
    """[source]: to int8, for the products that follow."""
    MULTIPLY = 10
    """[matrix, n, out]: products of what was rounded last with ``n`` matrices that follow one another, next to one another."""


OPERANDS = 5
"""Integers of an operation besides its code."""


class Activation(IntEnum):
    """Of a gated MLP: SiLU, or the tanh approximation of GELU."""

    SILU = 0
    GELU_TANH = 1


class Buffer(IntEnum):
    """Columns of fp32 numbers, with a row per token, or for those that are taken and for logits per row that needs logits."""

    X = 0
    """The residual sum."""
    NORMED = 1
    PROJECTED = 2
    """What attention or the MLP adds to it."""
    QKV = 3
    """What is multiplied at once, and its parts before norms and rotation."""
    Q_PART = 4
    K_PART = 5
    V_PART = 6
    GATE_UP = 7
    GATE = 8
    UP = 9
    TAKEN = 10
    TAKEN_ATTENDED = 11
    Q = 12
    K = 13
    V = 14
    ATTENDED = 15
    LOGITS = 16
    COS = 17
    SIN = 18
    LOCAL_COS = 19
    LOCAL_SIN = 20


class Array(IntEnum):
    """Memory that buffers are in: what all segments use again, rotations, logits, q, k and v, and the result of attention."""

    ARENA = 0
    ROTATIONS = 1
    LOGITS = 2
    PORTS = 3
    ATTENDED = 4
