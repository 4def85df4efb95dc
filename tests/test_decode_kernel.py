"""Attention of one query at sizes that need several parts, blocks, sets of heads and vectors, with rests of each."""

from typing import Any

import numba
import numpy as np
import pytest

from trt_kv.manifest import KV_DTYPES
from trt_kv.plugins.decode_cpu import NO_WINDOW, PART_TOKENS, attend_one
from trt_kv.plugins.kv_rows import KvDtype, load, store
from trt_kv.plugins.paging import Floats, Ints

PAGE = 7
N_HEADS, N_KV_HEADS, HEAD_SIZE = 10, 2, 83
LENGTHS = (2 * PART_TOKENS + 45, 1, PART_TOKENS)


def decode(q_BHD: Floats, table_BKT: Ints, kv: Any, lengths: tuple[int, ...]) -> tuple[Floats, Floats]:
    out, lse = np.empty(q_BHD.shape, np.float32), np.empty(q_BHD.shape[:2], np.float32)
    rows_B, scale = np.arange(len(lengths)), np.float32(HEAD_SIZE**-0.5)
    attend_one(q_BHD, rows_B, table_BKT, np.array(lengths), kv, scale, np.float32(0.0), *NO_WINDOW, out, lse)
    return out, lse


@pytest.mark.parametrize(
    "kv_dtype", [pytest.param(name, marks=pytest.mark.slow if "float16" in name else ()) for name in KV_DTYPES]
)
def test_one_query_as_in_fp64_and_with_the_same_bits_in_any_company(kv_dtype: str) -> None:
    """Each KV head has pages of its own. What is behind the last token is NaN, and must not be read."""
    rng = np.random.default_rng(0)
    n_pages = -(-max(LENGTHS) // PAGE)
    table_BKT = rng.permuted(np.tile(np.arange(n_pages), (len(LENGTHS), N_KV_HEADS, 1)), axis=2)
    q_BHD = rng.standard_normal((len(LENGTHS), N_HEADS, HEAD_SIZE), np.float32)
    values = rng.standard_normal((n_pages, 2, N_KV_HEADS, PAGE, HEAD_SIZE), np.float32)
    for head in range(N_KV_HEADS):
        values[table_BKT[0, head, LENGTHS[0] // PAGE], :, head, LENGTHS[0] % PAGE :] = np.nan
    kv = store(values, KvDtype(kv_dtype))
    out, lse = decode(q_BHD[:1], table_BKT[:1], kv, LENGTHS[:1])
    numbers = load(kv).astype(np.float64)
    for h in range(N_HEADS):
        head = h * N_KV_HEADS // N_HEADS
        k_SD, v_SD = numbers[table_BKT[0, head], :, head].transpose(1, 0, 2, 3).reshape(2, -1, HEAD_SIZE)[:, : LENGTHS[0]]
        logits_S = k_SD @ q_BHD[0, h] * HEAD_SIZE**-0.5
        expected_lse = np.logaddexp.reduce(logits_S)
        np.testing.assert_allclose(lse[0, h], expected_lse, atol=3e-6)
        np.testing.assert_allclose(out[0, h], np.exp(logits_S - expected_lse) @ v_SD, atol=2e-6)
    kv[np.isnan(values).any(axis=-1)] = 0
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    together, together_lse = decode(q_BHD, table_BKT, kv, LENGTHS)
    numba.set_num_threads(threads)
    assert np.array_equal(together[0], out[0])
    assert np.array_equal(together_lse[0], lse[0])
    nothing, _ = decode(np.full_like(q_BHD, np.nan), table_BKT, kv, LENGTHS)
    assert np.isnan(nothing).all()
