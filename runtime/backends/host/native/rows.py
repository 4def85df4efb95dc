"""What is computed of one row at a time (numba).

The order of every sum is fixed, and nothing may change it: a row has the same bits wherever it is computed.
"""

import numba
import numpy as np

from trt_kv.plugins.fast_math import exp_nonpositive, tanh_of
from trt_kv.plugins.jit import njit
from trt_kv.plugins.paging import Floats

LANES = 16
ONE, TWO = np.float32(1.0), np.float32(2.0)
GELU_INNER, GELU_CUBE = np.float32(0.7978845608028654), np.float32(0.044715)
"""sqrt(2 / pi), and the factor of x**3, in the tanh approximation of GELU (Hendrycks and Gimpel 2016)."""


@numba.njit(inline="always", error_model="numpy")
def sigmoid(x: np.float32) -> np.float32:
    """1 / (1 + exp(-x))."""
    fallen = exp_nonpositive(-abs(x))
    return (ONE if x >= 0 else fallen) / (ONE + fallen)


@njit(error_model="numpy")
def normalize(x: Floats, weight: Floats, eps: np.float32, lanes: Floats, out: Floats) -> None:
    """``out = x / sqrt(mean(x * x) + eps) * weight``. ``lanes`` [LANES]: memory for sums of every 16th number."""
    n_whole = len(x) - len(x) % LANES
    lanes[:] = 0.0
    for first in range(0, n_whole, LANES):
        for lane in range(LANES):
            lanes[lane] += x[first + lane] * x[first + lane]
    total = np.float32(0.0)
    for lane in range(LANES):
        total += lanes[lane]
    for i in range(n_whole, len(x)):
        total += x[i] * x[i]
    factor = ONE / np.sqrt(total / np.float32(len(x)) + eps)
    for i in range(len(x)):
        out[i] = x[i] * factor * weight[i]


@njit(error_model="numpy")
def rotate(head: Floats, cos: Floats, sin: Floats, out: Floats) -> None:
    """Channel d with channel d + ``len(cos)``; those behind the pairs stay."""
    n_pairs = len(cos)
    for d in range(n_pairs):
        low, high = head[d], head[d + n_pairs]
        out[d] = low * cos[d] - high * sin[d]
        out[d + n_pairs] = high * cos[d] + low * sin[d]
    for d in range(2 * n_pairs, len(head)):
        out[d] = head[d]


@njit(error_model="numpy")
def gate_by_silu(gate: Floats, up: Floats) -> None:
    """``gate = gate * sigmoid(gate) * up``."""
    for i in range(len(gate)):
        gate[i] = gate[i] * sigmoid(gate[i]) * up[i]


@njit(error_model="numpy")
def gate_by_gelu(gate: Floats, up: Floats) -> None:
    """``gate = gelu(gate) * up``; (1 + tanh(y)) / 2 is sigmoid(2 y)."""
    for i in range(len(gate)):
        x = gate[i]
        gate[i] = x * sigmoid(TWO * GELU_INNER * (x + GELU_CUBE * x * x * x)) * up[i]


@njit(error_model="numpy")
def cap(x: Floats, most: np.float32) -> None:
    """``most * tanh(x / most)``."""
    for i in range(len(x)):
        x[i] = most * tanh_of(x[i] / most)


@njit(error_model="numpy")
def add(total: Floats, addend: Floats, factor: np.float32) -> None:
    """``total += factor * addend``."""
    for i in range(len(total)):
        total[i] += factor * addend[i]


@njit(error_model="numpy")
def copy(source: Floats, out: Floats) -> None:
    """``out = source``."""
    for i in range(len(source)):
        out[i] = source[i]
