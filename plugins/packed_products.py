"""STAND-IN until the real one is merged."""
from typing import Any, NamedTuple
import numba
import numpy as np
from trt_kv.plugins.jit import njit
from trt_kv.plugins.paging import Floats


class PackedWeights(NamedTuple):
    bits: int
    block_size: int
    blocks: Any
    scales: Any
    zero_points: Any
    offsets: Any
    bias: Any


@njit()
def round_activations(x, block_size, values, scales, sums):
    for r in range(x.shape[0]):
        for m in range(x.shape[1] // block_size):
            top = np.float32(0.0)
            for i in range(m * block_size, (m + 1) * block_size):
                top = max(top, abs(x[r, i]))
            scale = top / np.float32(127.0)
            inverse = np.float32(0.0) if scale == 0.0 else np.float32(1.0) / scale
            total = 0
            for i in range(m * block_size, (m + 1) * block_size):
                q = np.int32(np.rint(x[r, i] * inverse))
                values[r, i] = q
                total += q
            scales[r, m] = scale
            sums[r, m] = scale * np.float32(total)


@njit()
def _q(w, n, m, i):
    if w.bits == 8:
        return np.int32(w.blocks[n, m, i])
    byte = w.blocks[n, m, i // 2]
    return np.int32(byte & 15) if i % 2 == 0 else np.int32(byte >> 4)


@njit()
def _zero(w, n, m):
    if w.zero_points.shape[1] == 0:
        return 1 << (w.bits - 1)
    if w.bits == 8:
        return np.int64(w.zero_points[n, m])
    byte = w.zero_points[n, m // 2]
    return np.int64(byte & 15) if m % 2 == 0 else np.int64(byte >> 4)


@njit(parallel=True)
def multiply_packed(values, scales, sums, w, out):
    for n in numba.prange(w.blocks.shape[0]):
        S = w.block_size
        for r in range(values.shape[0]):
            total = np.float32(0.0)
            for m in range(w.blocks.shape[1]):
                dot = np.int32(0)
                if w.bits == 4:
                    for i in range(S // 2):
                        byte = np.int32(w.blocks[n, m, i])
                        dot += (byte & 15) * np.int32(values[r, m * S + 2 * i]) + (byte >> 4) * np.int32(values[r, m * S + 2 * i + 1])
                else:
                    for i in range(S):
                        dot += np.int32(w.blocks[n, m, i]) * np.int32(values[r, m * S + i])
                total += scales[r, m] * w.scales[n, m] * np.float32(dot)
                shift = -w.scales[n, m] * np.float32(_zero(w, n, m))
                if w.offsets.shape[1]:
                    shift += w.offsets[n, m]
                total += shift * sums[r, m]
            if w.bias.shape[0]:
                total += w.bias[n]
            out[r, n] = total


@njit()
def gather_packed(w, row, out):
    S = w.block_size
    for m in range(w.blocks.shape[1]):
        zero = np.float32(_zero(w, row, m))
        for i in range(S):
            value = w.scales[row, m] * (np.float32(_q(w, row, m, i)) - zero)
            if w.offsets.shape[1]:
                value += w.offsets[row, m]
            out[m * S + i] = value
