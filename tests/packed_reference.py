"""Products with packed weights in plain numpy, bit for bit as ``plugins/packed_products.py`` defines them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.export.packing import packed_bits, unpacked
from trt_kv.plugins.packed_weights import PackedWeights
from trt_kv.plugins.paging import Floats


def random_weights(
    n_columns: int, n_blocks: int, block_size: int, bits: int, *, zeros: bool, offsets: bool, bias: bool, seed: int
) -> PackedWeights:
    """As memory maps are: arrays that cannot be written."""
    rng = np.random.default_rng(seed)
    q = rng.integers(0, 2**bits, (n_columns, n_blocks, block_size), np.uint8)
    parts: dict[str, Any] = {
        "blocks": packed_bits(q, bits),
        "scales": rng.standard_normal((n_columns, n_blocks), np.float32),
        "zero_points": packed_bits(rng.integers(0, 2**bits, (n_columns, n_blocks), np.uint8), bits) if zeros else None,
        "offsets": rng.standard_normal((n_columns, n_blocks), np.float32) if offsets else None,
        "bias": rng.standard_normal(n_columns, np.float32) if bias else None,
    }
    present = {name: array for name, array in parts.items() if array is not None}
    for array in present.values():
        array.flags.writeable = False
    return PackedWeights(bits=bits, **present)


def rounded(x_RK: Floats) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Integers [R, K], and the scale of each of them."""
    n_units = -(-x_RK.shape[1] // 32)
    x_RUS = np.pad(x_RK, ((0, 0), (0, n_units * 32 - x_RK.shape[1]))).reshape(len(x_RK), n_units, 32)
    top_RU = np.abs(x_RUS).max(-1)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scale_RU = np.where(top_RU < np.float32(1e-36), np.float32(0), top_RU / np.float32(127))
        inverse_RU = np.where(top_RU < np.float32(1e-36), np.float32(0), np.float32(127) / top_RU)
        q_RUS = np.rint(x_RUS * inverse_RU[..., None])
    q_RK = q_RUS.reshape(len(x_RK), -1)[:, : x_RK.shape[1]].astype(np.int8)
    return q_RK, scale_RU.repeat(32, axis=1)[:, : x_RK.shape[1]]


def product(x_RK: Floats, weights: PackedWeights) -> Floats:
    """[R, N]: units of 32 values, or 16, in eight chains."""
    unit = min(32, weights.block_size)
    q_RK, scale_RK = rounded(x_RK)
    w_NK: Any = unpacked(weights.blocks, weights.bits).reshape(weights.n_columns, -1)
    zero_NM: Any = np.full(weights.scales.shape, 2.0 ** (weights.bits - 1), np.float32)
    if weights.zero_points.size:
        zero_NM = unpacked(weights.zero_points, weights.bits)[:, : weights.scales.shape[1]].astype(np.float32)
    offset_NM = weights.offsets if weights.offsets.size else np.zeros_like(zero_NM)
    correction_NM = fused(-weights.scales, zero_NM, offset_NM)
    chains = np.zeros((8, len(x_RK), weights.n_columns), np.float32)
    for u in range(weights.n_inputs // unit):
        values, block = slice(u * unit, (u + 1) * unit), u * unit // weights.block_size
        q_RS, scale_R1 = q_RK[:, values].astype(np.int64), scale_RK[:, values][:, :1]
        dot_RN = (q_RS @ w_NK[:, values].T.astype(np.int64)).astype(np.float32)
        sum_R1 = q_RS.sum(1, keepdims=True).astype(np.float32) * scale_R1
        added_RN = fused(scale_R1 * weights.scales[:, block], dot_RN, chains[u % 8])
        chains[u % 8] = fused(correction_NM[:, block], sum_R1, added_RN)
    for n in (4, 2, 1):
        chains[:n] += chains[n : 2 * n]
    total_RN: Floats = chains[0] + weights.bias if weights.bias.size else chains[0]
    return total_RN


def fused(a: Floats, b: Floats, c: Floats) -> Floats:
    """``a * b + c`` rounded once to fp32: the sum in fp64 is rounded to odd, after which rounding to fp32 is exact (Boldo and
    Melquiond, 2008).
    """
    exact, c = a.astype(np.float64) * b, c.astype(np.float64)
    total = np.asarray(exact + c)
    rest = total - exact
    error = (exact - (total - rest)) + (c - rest)
    even = (total.view(np.int64) & 1) == 0
    odd = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    rounded_once: Floats = np.where((error != 0) & even, odd, total).astype(np.float32)
    return rounded_once
