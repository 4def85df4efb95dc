"""The best tokens of a vocabulary up to a mass, without sorting it: a radix select over 32-bit keys.

A pass adds up the weights of the tokens per value of 11 bits of their key, from the highest bits down. The bucket in which the
mass is reached holds the last token that is selected; only its tokens are looked at by the next pass.
"""

import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.jit import njit
from trt_kv.plugins.paging import Floats, Ints

Keys = NDArray[np.uint32]

_BUCKETS = 2048
_TABLES = 2
"""Neighbours are added to different tables, so that an addition need not wait for the one before."""
_BLOCK = 512


def keys_of(values_N: Floats) -> Keys:
    """Keys [N] uint32 that are ordered as the fp32 numbers are."""
    bits_N = (values_N + np.float32(0.0)).view(np.int32)  # -0 becomes 0
    keys_N: Keys = (bits_N ^ ((bits_N >> 31) & 0x7FFFFFFF)).view(np.uint32) ^ np.uint32(0x80000000)
    return keys_N


@njit(nogil=True)
def heaviest(keys_N: Keys, weights_N: Floats, mass: float) -> Ints:
    """The shortest prefix of the tokens, by descending key and then ascending index, whose weights have the ``mass``; if none
    has it, all tokens. Indices [S] in ascending order, at least one.

    ``keys_N`` [N] uint32; ``weights_N`` [N] fp32, not negative.
    """
    n_tokens = len(keys_N)
    mass_TB = np.zeros((_TABLES, _BUCKETS), np.float64)
    for n in range(n_tokens):
        mass_TB[n % _TABLES, keys_N[n] >> np.uint32(21)] += weights_N[n]
    bucket, before = _last_bucket(mass_TB, mass)
    lowest, highest = np.uint32(bucket << 21), np.uint32((bucket << 21) | 0x1FFFFF)
    left_N = np.empty(n_tokens + 1, np.int64)
    n_left = 0
    for n in range(n_tokens):
        left_N[n_left] = n
        n_left += (keys_N[n] >= lowest) & (keys_N[n] <= highest)
    for shift, mask in ((10, 0x3FF), (0, 0)):
        mass_TB[:] = 0.0
        for at in range(n_left):
            n = left_N[at]
            mass_TB[at % _TABLES, (keys_N[n] >> np.uint32(shift)) & np.uint32(_BUCKETS - 1 if shift else 0x3FF)] += weights_N[n]
        bucket, more = _last_bucket(mass_TB, mass - before)
        before += more
        lowest |= np.uint32(bucket << shift)
        highest = lowest | np.uint32(mask)
        kept = 0
        for at in range(n_left):
            n = left_N[at]
            left_N[kept] = n
            kept += (keys_N[n] >= lowest) & (keys_N[n] <= highest)
        n_left = kept
    last = -1
    for at in range(n_left):
        last = left_N[at]
        before += weights_N[last]
        if before >= mass:
            break
    found_S = np.empty(n_tokens + 1, np.int64)
    n_found = 0
    for n in range(n_tokens):
        found_S[n_found] = n
        n_found += (keys_N[n] > lowest) | ((keys_N[n] == lowest) & (n <= last))
    return found_S[:n_found]


@njit(nogil=True)
def _last_bucket(mass_TB: Floats, mass: float) -> tuple[int, float]:
    """The highest bucket in which the mass is reached, and the mass above it; else the lowest bucket that has a weight."""
    last, before, total = 0, 0.0, 0.0
    for bucket in range(_BUCKETS - 1, -1, -1):
        of_bucket = mass_TB[0, bucket] + mass_TB[1, bucket]
        if of_bucket > 0.0:
            last, before = bucket, total
            total += of_bucket
            if total >= mass:
                break
    return last, before


@njit(nogil=True, fastmath={"reassoc", "contract"})
def _sum(weights_N: Floats, start: int, end: int) -> float:
    total = 0.0
    for n in range(start, end):
        total += weights_N[n]
    return total


@njit(nogil=True)
def drawn(weights_N: Floats, uniform: float) -> int:
    """The index at which the sum of the weights [N] passes ``uniform`` (in [0, 1)) of the whole; one with a weight above 0."""
    n_blocks = (len(weights_N) + _BLOCK - 1) // _BLOCK
    mass_B = np.empty(n_blocks, np.float64)
    for block in range(n_blocks):
        mass_B[block] = _sum(weights_N, block * _BLOCK, min(len(weights_N), (block + 1) * _BLOCK))
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
