"""The best tokens of a vocabulary up to a mass, without sorting it, and a draw among them (numba).

A pass adds up the weights from each of eight pivots on, which leaves an eighth of the bracket that holds the last token of the
selection. Four passes leave some hundred tokens, which are sorted. A pass is about as fast as reading the numbers, because
the vectoriser takes such loops if they run over slices.
"""

import numpy as np

from trt_kv.plugins.fast_math import exp_or_zero
from trt_kv.plugins.jit import njit
from trt_kv.plugins.paging import Floats, Ints

_BLOCK = 512
"""Weights that are added up in fp32 before they are added to an fp64 sum."""
_STRIP = 32
_PIVOTS = 8
_PASSES = 4
"""Over all tokens, before those in the bracket are put together."""
_FEW = 256
"""At most so many tokens are sorted; more are divided by further passes."""
_FASTMATH = {"reassoc", "contract", "nsz"}
_ZERO = np.float32(0.0)
_INFINITY = np.float32(np.inf)


@njit(nogil=True, fastmath={"contract"})
def scaled_exp(logits_N: Floats, largest: np.float32, factor: np.float32) -> tuple[Floats, Floats]:
    """``x = (logits - largest) * factor`` and ``exp(x)``, fp32; the latter is 0 where x < -87."""
    x_N, weights_N = np.empty_like(logits_N), np.empty_like(logits_N)
    for n in range(len(logits_N)):
        x_N[n] = (logits_N[n] - largest) * factor
        weights_N[n] = exp_or_zero(x_N[n])
    return x_N, weights_N


@njit(nogil=True, fastmath=_FASTMATH)
def drop_below(values_N: Floats, weights_N: Floats, lowest: np.float32) -> None:
    """Set to 0, in place, the weights of values that are less than ``lowest``."""
    for n in range(len(values_N)):
        weights_N[n] = weights_N[n] if values_N[n] >= lowest else _ZERO


@njit(nogil=True)
def keep_best(values_N: Floats, weights_N: Floats, mass: float) -> None:
    """Set to 0, in place, all weights but those of the shortest prefix of the tokens, by descending value and then ascending
    index, whose weights have the ``mass``. If none has it, all stay; one stays at least.

    ``values_N`` [N] fp32, finite where the weight is not 0; ``weights_N`` [N] fp32, not negative.
    """
    lowest, last = _end_of_prefix(values_N, weights_N, mass)
    drop_below(values_N[: last + 1], weights_N[: last + 1], lowest)
    drop_below(values_N[last + 1 :], weights_N[last + 1 :], np.nextafter(lowest, _INFINITY))


@njit(nogil=True)
def _end_of_prefix(values_N: Floats, weights_N: Floats, mass: float) -> tuple[np.float32, int]:
    """The value of the prefix's last token, and the index up to which tokens of that value belong to it."""
    low, largest = _bounds(values_N, weights_N)
    high = np.nextafter(largest, _INFINITY)  # the last token is in [low, high)
    above = 0.0  # the mass of [high, infinity)
    masses = np.empty(_PIVOTS, np.float64)
    values, weights = values_N, weights_N
    indices = np.empty(0, np.int64)
    n_passes = 0
    while True:
        if n_passes >= _PASSES:
            among = _between(values, weights, low, high)
            indices = among if len(indices) == 0 else indices[among]
            values, weights = values[among], weights[among]
            if len(values) <= _FEW:
                break
        step = (high - low) / np.float32(_PIVOTS)
        _masses_from(values, weights, low, step, masses)
        if n_passes == 0 and masses[0] < mass:
            return np.float32(-np.inf), len(values_N) - 1
        beyond = 0.0 if n_passes < _PASSES else above
        reached = _PIVOTS - 1
        while reached > 0 and beyond + masses[reached] < mass:
            reached -= 1
        before = low, high
        if reached < _PIVOTS - 1:
            above = beyond + masses[reached + 1]
            high = low + step * np.float32(reached + 1)
        low = low + step * np.float32(reached)
        if (low, high) == before and n_passes >= _PASSES:
            break  # no number is between the two: all are equal
        n_passes += 1
    order = np.arange(len(values)) if len(values) > _FEW else np.argsort(-values, kind="mergesort")
    for at in order:
        above += weights[at]
        if above >= mass:
            return values[at], indices[at]
    return low, len(values_N) - 1  # rounding: the bracket's own mass was a little less


@njit(nogil=True)
def _bounds(values_N: Floats, weights_N: Floats) -> tuple[np.float32, np.float32]:
    """The smallest and the largest value with a weight: of every ``_BLOCK``-th value, and then of those, because the vectoriser
    refuses the maximum of a row.
    """
    low_B, high_B = np.full(_BLOCK, _INFINITY), np.full(_BLOCK, -_INFINITY)
    for start in range(0, len(values_N), _BLOCK):
        values, weights = values_N[start : start + _BLOCK], weights_N[start : start + _BLOCK]
        for n in range(len(values)):
            low_B[n] = min(low_B[n], values[n] if weights[n] > _ZERO else _INFINITY)
            high_B[n] = max(high_B[n], values[n] if weights[n] > _ZERO else -_INFINITY)
    return low_B.min(), high_B.max()


@njit(nogil=True, fastmath=_FASTMATH)
def _masses_from(values_N: Floats, weights_N: Floats, low: np.float32, step: np.float32, masses: Floats) -> None:
    """``masses[i]``: the weights of the values that are at least ``low + i * step``."""
    p0, p1, p2, p3 = low, low + step, low + step * np.float32(2), low + step * np.float32(3)
    p4, p5 = low + step * np.float32(4), low + step * np.float32(5)
    p6, p7 = low + step * np.float32(6), low + step * np.float32(7)
    masses[:] = 0.0
    for start in range(0, len(values_N), _BLOCK):
        values, weights = values_N[start : start + _BLOCK], weights_N[start : start + _BLOCK]
        m0 = m1 = m2 = m3 = m4 = m5 = m6 = m7 = _ZERO
        for n in range(len(values)):
            value, weight = values[n], weights[n]
            m0 += weight if value >= p0 else _ZERO
            m1 += weight if value >= p1 else _ZERO
            m2 += weight if value >= p2 else _ZERO
            m3 += weight if value >= p3 else _ZERO
            m4 += weight if value >= p4 else _ZERO
            m5 += weight if value >= p5 else _ZERO
            m6 += weight if value >= p6 else _ZERO
            m7 += weight if value >= p7 else _ZERO
        for i, mass in enumerate((m0, m1, m2, m3, m4, m5, m6, m7)):
            masses[i] += mass


@njit(nogil=True)
def _between(values_N: Floats, weights_N: Floats, low: np.float32, high: np.float32) -> Ints:
    """Indices, ascending, of the tokens with a weight and a value in [low, high)."""
    found = np.empty(len(values_N) + 1, np.int64)
    n_found = 0
    for start in range(0, len(values_N), _STRIP):
        values, weights = values_N[start : start + _STRIP], weights_N[start : start + _STRIP]
        n_here = np.int32(0)
        for n in range(len(values)):
            n_here += np.int32((values[n] >= low) & (values[n] < high))
        if n_here:
            for n in range(len(values)):
                found[n_found] = start + n
                n_found += (values[n] >= low) & (values[n] < high) & (weights[n] > _ZERO)
    return found[:n_found]


@njit(nogil=True, fastmath=_FASTMATH)
def sums(weights_N: Floats, x_N: Floats) -> tuple[float, float]:
    """The sum of the weights, and that of ``weights * x`` over tokens with a weight; fp64 sums of fp32 blocks."""
    total, of_products = 0.0, 0.0
    for start in range(0, len(weights_N), _BLOCK):
        weights, x = weights_N[start : start + _BLOCK], x_N[start : start + _BLOCK]
        in_block = product_in_block = _ZERO
        for n in range(len(weights)):
            in_block += weights[n]
            product_in_block += weights[n] * x[n] if weights[n] > _ZERO else _ZERO
        total += float(in_block)
        of_products += float(product_in_block)
    return total, of_products


@njit(nogil=True)
def negated_distance(x_N: Floats, mean: np.float32) -> None:
    """``-abs(x - mean)``, in place."""
    for n in range(len(x_N)):
        x_N[n] = -abs(x_N[n] - mean)


@njit(nogil=True, fastmath=_FASTMATH)
def _block_sums(weights_N: Floats, mass_B: Floats) -> None:
    for block in range(len(mass_B)):
        total = _ZERO
        weights = weights_N[block * _BLOCK : (block + 1) * _BLOCK]
        for n in range(len(weights)):
            total += weights[n]
        mass_B[block] = total


@njit(nogil=True)
def drawn(weights_N: Floats, uniform: float) -> int:
    """The index at which the sum of the weights [N] passes ``uniform`` (in [0, 1)) of the whole; one with a weight above 0."""
    n_blocks = (len(weights_N) + _BLOCK - 1) // _BLOCK
    mass_B = np.empty(n_blocks, np.float64)
    _block_sums(weights_N, mass_B)
    left = uniform * mass_B.sum()
    block = 0
    while block < n_blocks - 1 and left >= mass_B[block]:
        left -= mass_B[block]
        block += 1
    chosen = -1
    for n in range(block * _BLOCK, min(len(weights_N), (block + 1) * _BLOCK)):
        if weights_N[n] > 0.0:
            chosen = n
            left -= weights_N[n]
            if left < 0.0:
                return chosen
    if chosen >= 0:
        return chosen
    return int(np.argmax(weights_N))  # rounding led to a block without any weight
