"""Scalar functions that numba's vectoriser can inline, unlike calls to libm."""

import numba
import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.jit import njit

LOG2_E = np.float32(1.4426950408889634)
SMALLEST = np.float32(-87.0)
ONE = np.float32(1.0)
# Interpolation of 2**f at the 7 Chebyshev nodes of [0, 1]: relative error 3e-9, in fp32 arithmetic 1e-7.
C0, C1, C2, C3, C4, C5, C6 = (
    np.float32(c) for c in (1.0, 0.693146933, 0.240230454, 0.0554806302, 0.00968418631, 0.00123913318, 0.000218657848)
)

# tanh(x) = x - x**3 / 3 + 2 x**5 / 15 - ...: below NEAR the next term is less than 1e-8 of x.
NEAR = np.float32(0.25)
T1, T3, T5, T7, T9 = (np.float32(t) for t in (1.0, -1 / 3, 2 / 15, -17 / 315, 62 / 2835))


@numba.njit(inline="always", fastmath={"contract"})
def exp_nonpositive(x: np.float32) -> np.float32:
    """exp(x) for x <= 0 in fp32; below -87 the result is exp(-87), which vanishes in any fp32 sum with 1."""
    y = max(x, SMALLEST) * LOG2_E
    whole = np.floor(y)
    f = np.float32(y - whole)
    mantissa = C0 + f * (C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6)))))
    return mantissa * np.int32((np.int32(whole) + 127) << 23).view(np.float32)


@numba.njit(inline="always", fastmath={"contract"})
def exp_or_zero(x: np.float32) -> np.float32:
    """``exp_nonpositive``, but 0 below -87: what is hidden (-inf) adds nothing at all. NaN stays NaN."""
    return np.float32(0.0) if x < SMALLEST else exp_nonpositive(x)


@numba.njit(inline="always", fastmath={"contract"})
def tanh_of(x: np.float32) -> np.float32:
    """tanh(x) in fp32, error below 2e-7: near 0, where 1 - exp(-2 |x|) would cancel, a Taylor polynomial. NaN stays NaN."""
    square = x * x
    near = x * (T1 + square * (T3 + square * (T5 + square * (T7 + square * T9))))
    fallen = exp_nonpositive(np.float32(-2.0) * abs(x))
    far = np.copysign((ONE - fallen) / (ONE + fallen), x)
    return far if square >= NEAR * NEAR else near


@njit()
def fill(values: NDArray[np.float32], first: int, end: int, value: np.float32) -> None:
    """``values[first:end] = value``, for which numba compiles many functions that make texts of errors: seconds."""
    for i in range(first, end):
        values[i] = value
