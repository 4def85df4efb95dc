"""Operations on the rows of a step: what a ``Segment`` is a list of, and what ``interpreter.py`` runs.

An operation is a row of integers: its code, the buffers that it reads and writes, and numbers whose meaning depends on the code.
Each row of a buffer is computed from the same rows of others alone, so that it does not depend on how many rows there are.
"""

from enum import IntEnum


class Op(IntEnum):
    """Codes. ``[a, b, ...]`` are the integers behind one; numbers of type fp32 are places in the array of constants."""

    EMBED = 0
    """[matrix, out]: rows of a matrix, of the step's tokens."""
    TAKE = 1
    """[source, out]: the rows that need logits."""
    NORMALIZE = 2
    """[source, out, weight, eps, width]: RMSNorm of each ``width`` channels (Zhang and Sennrich 2019, equation 4)."""
    ROTATE = 3
    """[buffer, n_heads, rope]: channel d with channel d + the number of pairs of every head."""
    GATE = 4
    """[gate, up, activation]: ``gate = activation(gate) * up``, by an ``Activation``."""
    ADD = 5
    """[sum, addend, factor]: ``sum += factor * addend``."""
    SCALE = 6
    """[buffer, factor]."""
    CAP = 7
    """[buffer, cap]: ``cap * tanh(x / cap)``."""
    ROUND = 8
    """[source, block size]: to int8, for the products behind it."""
    MULTIPLY_FP32 = 9
    """[source, matrix, out]: the product with a small matrix that is not packed."""
    MULTIPLY = 10
    """[source, n, matrix, out, matrix, out, ...]: products of the source, which was rounded last, with ``n`` packed matrices."""


class Activation(IntEnum):
    """Of a gated MLP: SiLU, or the tanh approximation of GELU."""

    SILU = 0
    GELU_TANH = 1


class Buffer(IntEnum):
    """Values of a step, a row per token. Those in ``EXTERNAL`` belong to the caller."""

    X = 0
    """The residual sum."""
    TAKEN = 1
    """That of the rows that need logits."""
    NORMED = 2
    PROJECTED = 3
    GATE = 4
    UP = 5
    TAKEN_ATTENDED = 6
    Q = 7
    K = 8
    V = 9
    ATTENDED = 10
    LOGITS = 11


OPERANDS = 8
"""Integers of an operation besides its code."""
MOST_PRODUCTS = 3
"""Matrices of one MULTIPLY."""
