"""The CPU kernels of a chunk at sizes that need several blocks, tiles and strips, with parts of each at the end."""

import numba
import numpy as np
import pytest

from trt_kv.plugins.attention_cpu import attend_chunk
from trt_kv.plugins.chunk_blocks import BLOCK_TOKENS, STRIP_ROWS, TILE_ROWS, cap
from trt_kv.plugins.paging import Floats, Ints, gather_kv
from trt_kv.plugins.token_scores.cpu import attention_received

PAGE = 7
SIZES = [
    (1, BLOCK_TOKENS + 1, 4, 2, 5),
    (TILE_ROWS + 3, 2 * BLOCK_TOKENS + 11, 6, 2, 11),
    (STRIP_ROWS - 1, BLOCK_TOKENS, 2, 2, 24),
    (43, 43, 10, 2, 6),
]


class Chunk:
    """The last ``n`` of ``n_cached`` tokens, in pages in random order; each KV head may have its own order of the slots."""

    def __init__(self, n: int, n_cached: int, n_heads: int, n_kv_heads: int, head_size: int, *, shuffled: bool) -> None:
        rng = np.random.default_rng(n_cached)
        n_pages = -(-n_cached // PAGE)
        self.q_NHD: Floats = rng.standard_normal((n, n_heads, head_size), np.float32)
        self.pages_T: Ints = rng.permutation(n_pages + 2)[:n_pages]
        self.kv: Floats = np.full((n_pages + 2, 2, n_kv_heads, PAGE, head_size), np.nan, np.float32)
        for slot in range(n_cached):
            self.kv[self.pages_T[slot // PAGE], :, :, slot % PAGE] = rng.standard_normal((2, n_kv_heads, head_size))
        self.positions_N: Ints = np.arange(n_cached - n, n_cached)
        orders = [rng.permutation(n_cached) if shuffled else np.arange(n_cached) for _ in range(n_kv_heads)]
        self.positions_KS: Ints = np.stack(orders)
        self.scale = head_size**-0.5

    def attention(self) -> tuple[Floats, Floats]:
        return attend_chunk(self.q_NHD, self.positions_N, self.pages_T, self.kv, self.positions_KS, self.scale)

    def received(self, lse_NH: Floats) -> Floats:
        return attention_received(self.q_NHD, lse_NH, self.positions_N, self.pages_T, self.kv, self.positions_KS, self.scale)

    def expected(self) -> tuple[Floats, Floats, Floats]:
        """Output, log-sum-exp and received attention in fp64."""
        k_KSD, v_KSD = (x.astype(np.float64) for x in gather_kv(self.kv, self.pages_T, self.positions_KS.shape[1]))
        group = self.q_NHD.shape[1] // len(k_KSD)
        logits_HNS = np.einsum("nhd,hsd->hns", self.q_NHD.astype(np.float64), k_KSD.repeat(group, axis=0)) * self.scale
        hidden_HNS = (self.positions_KS[:, None] > self.positions_N[:, None]).repeat(group, axis=0)
        logits_HNS[hidden_HNS] = -np.inf
        lse_HN = np.logaddexp.reduce(logits_HNS, axis=2)
        weights_HNS = np.exp(logits_HNS - lse_HN[..., None])
        received_KS = weights_HNS.sum(axis=1).reshape(len(k_KSD), group, -1).mean(axis=1)
        return np.einsum("hns,hsd->nhd", weights_HNS, v_KSD.repeat(group, axis=0)), lse_HN.T, received_KS


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "an order per head"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention_and_scores_are_those_of_fp64(sizes: tuple[int, int, int, int, int], *, shuffled: bool) -> None:
    """What is behind the last token is NaN and must not be read."""
    chunk = Chunk(*sizes, shuffled=shuffled)
    out, lse, received = chunk.expected()
    found_out, found_lse = chunk.attention()
    np.testing.assert_allclose(found_out, out, atol=2e-6)
    np.testing.assert_allclose(found_lse, lse, atol=4e-6)
    np.testing.assert_allclose(chunk.received(found_lse), received, atol=2e-5)


def test_a_row_has_the_same_bits_with_any_threads_and_in_any_company() -> None:
    chunk = Chunk(*SIZES[1], shuffled=False)
    out, lse = chunk.attention()
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    assert np.array_equal(chunk.attention()[0], out)
    numba.set_num_threads(threads)
    chunk.q_NHD, chunk.positions_N = chunk.q_NHD[20:], chunk.positions_N[20:]
    fewer_out, fewer_lse = chunk.attention()
    assert np.array_equal(fewer_out, out[20:])
    assert np.array_equal(fewer_lse, lse[20:])


def test_a_row_has_the_same_bits_however_many_later_tokens_follow() -> None:
    """Where a chunk ends does not matter: a strip reads up to the last token that one of its rows sees."""
    chunk = Chunk(*SIZES[1], shuffled=False)
    out, lse = chunk.attention()
    for n in (1, STRIP_ROWS + 1, TILE_ROWS):
        end = len(chunk.q_NHD) - n
        first = Chunk(*SIZES[1], shuffled=False)
        first.q_NHD, first.positions_N = first.q_NHD[:end], first.positions_N[:end]
        first.positions_KS = first.positions_KS[:, :-n]
        found_out, found_lse = first.attention()
        assert np.array_equal(found_out, out[:end])
        assert np.array_equal(found_lse, lse[:end])


def test_a_hidden_token_changes_nothing_and_nan_stays_nan() -> None:
    chunk = Chunk(*SIZES[1], shuffled=False)
    out, _ = chunk.attention()
    last = chunk.positions_KS.shape[1] - 1
    chunk.kv[chunk.pages_T[last // PAGE], 0, :, last % PAGE] = 1e4
    assert np.array_equal(chunk.attention()[0][:-1], out[:-1])
    chunk.kv[chunk.pages_T[0], 0, :, 0] = np.nan
    assert np.isnan(chunk.attention()[0]).all()
    chunk.q_NHD = np.full_like(chunk.q_NHD, np.nan)
    assert np.isnan(chunk.attention()[0]).all()


def test_a_soft_cap_is_a_tanh_of_any_number() -> None:
    """Both pieces of the function and the seam between them, infinities and what is no number."""
    x = np.concatenate([np.linspace(-12, 12, 4001), [0.25, -0.25, 1e-30, -1e30, np.inf, -np.inf, np.nan]]).astype(np.float32)
    capped = 2.0 * x[None].copy()
    cap(capped, 1, len(x), np.float32(2.0))
    np.testing.assert_allclose(capped[0], 2.0 * np.tanh(x.astype(np.float64)), atol=5e-7, rtol=5e-7)
