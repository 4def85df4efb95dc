"""A chunk of queries and cached tokens, in blocks that fit into the CPU's caches, and their products (numba).

Why not a BLAS: docs/decisions/0034-runtime-without-torch.md.
"""

import numba
import numpy as np

from trt_kv.plugins.fast_math import fill, tanh_of
from trt_kv.plugins.jit import njit
from trt_kv.plugins.kv_rows import head_size_of, number, scale_of
from trt_kv.plugins.paging import Floats, Ints, Rows
from trt_kv.plugins.vector_products import accumulate
from trt_kv.plugins.vectors import WIDEST, vector_width

BLOCK_TOKENS = 256
"""Cached tokens of a block."""
TILE_ROWS = 72
"""Rows of queries for which a block is kept in the second-level cache."""
STRIP_ROWS = 24
"""Rows whose products with a block, 24 KiB, are kept in the first-level cache: a multiple of the rows that ``accumulate`` has
at once, for both widths of vectors.
"""
UNROLLED = 8
"""Terms that a product adds at once. The sizes that it sums over are filled up with zeros to multiples of it."""

FASTMATH = {"contract", "reassoc", "nsz", "arcp"}


def query_rows(q_NHD: Floats, n_kv_heads: int, scale: float) -> Floats:
    """``scale * q``, the rows of each KV head together, token by token: [K, N * G, C]. C: D rounded up to ``UNROLLED``."""
    n_tokens, n_heads, head_size = q_NHD.shape
    q_NKGD = q_NHD.reshape(n_tokens, n_kv_heads, -1, head_size)
    rows = np.zeros((n_kv_heads, n_tokens, n_heads // n_kv_heads, _rounded_up(head_size)), np.float32)
    np.multiply(q_NKGD.transpose(1, 0, 2, 3), np.float32(scale), out=rows[..., :head_size])
    return rows.reshape(n_kv_heads, -1, rows.shape[-1])


def key_blocks(kv: Rows, pages_T: Ints, n_cached: int) -> Floats:
    """K of the first ``n_cached`` slots of ``pages_T`` in fp32, transposed: [K, blocks, C, T]; C as in ``query_rows``."""
    shape = kv.shape[2], _n_blocks(n_cached), _rounded_up(head_size_of(kv)), BLOCK_TOKENS
    blocks = np.zeros(shape, np.float32)
    _gather_transposed(kv, pages_T, n_cached, head_size_of(kv), blocks)
    return blocks


def value_blocks(kv: Rows, pages_T: Ints, n_cached: int) -> Floats:
    """V of the first ``n_cached`` slots of ``pages_T`` in fp32: [K, blocks, T, D]. Zeros at the end."""
    blocks = np.zeros((kv.shape[2], _n_blocks(n_cached), BLOCK_TOKENS, head_size_of(kv)), np.float32)
    _gather(kv, pages_T, n_cached, blocks)
    return blocks


def _rounded_up(n: int) -> int:
    return -(-n // UNROLLED) * UNROLLED


def _n_blocks(n_cached: int) -> int:
    return -(-n_cached // BLOCK_TOKENS)


@njit(fastmath=FASTMATH)
def multiply(a_RC: Floats, b_CS: Floats, out_RS: Floats, n_columns: int) -> None:
    """``out = a @ b`` for the first ``n_columns`` columns, or more up to the next multiple of ``WIDEST``, which b has."""
    n_filled = (n_columns + WIDEST - 1) // WIDEST * WIDEST
    for r in range(len(a_RC)):
        fill(out_RS[r], 0, n_filled, np.float32(0.0))
    add_product(a_RC, b_CS, out_RS, a_RC.shape[1], n_filled)


@njit(fastmath=FASTMATH)
def add_product(a_RC: Floats, b_CS: Floats, out_RS: Floats, n_terms: int, n_columns: int) -> None:
    """``out += a @ b`` for the first ``n_columns`` columns, summed over the first ``n_terms``.

    A row of the result has the same bits wherever it is among the rows. ``out`` has as many rows as count.
    """
    n_rows = min(len(a_RC), len(out_RS))
    accumulate(a_RC, b_CS, out_RS, n_rows, n_terms, n_columns)
    for r in range(n_rows):
        for s in range(n_columns - n_columns % vector_width(), n_columns):
            total = np.float32(0.0)
            for c in range(n_terms):
                total += a_RC[r, c] * b_CS[c, s]
            out_RS[r, s] += total


@njit()
def visible_end(positions_R: Ints, positions_T: Ints) -> int:
    """The number of tokens without those at the end that are later than all rows."""
    newest, end = positions_R.max(), len(positions_T)
    while end > 0 and positions_T[end - 1] > newest:
        end -= 1
    return end


@njit()
def hide_later(products_RT: Floats, positions_R: Ints, positions_T: Ints) -> None:
    """-inf where a row's position is before the token's."""
    oldest, first = positions_R.min(), 0
    while first < len(positions_T) and positions_T[first] <= oldest:
        first += 1
    for r in range(len(positions_R)):
        for t in range(first, len(positions_T)):
            if positions_T[t] > positions_R[r]:
                products_RT[r, t] = -np.inf


@njit()
def hide_earlier(products_RT: Floats, positions_R: Ints, positions_T: Ints, window: int) -> None:
    """-inf where the token is before the ``window`` positions that end with the row's."""
    if positions_T.min() > positions_R.max() - window:
        return
    for r in range(len(positions_R)):
        for t in range(len(positions_T)):
            if positions_T[t] <= positions_R[r] - window:
                products_RT[r, t] = -np.inf


@njit(fastmath=FASTMATH)
def cap(products_RT: Floats, n_rows: int, n_columns: int, soft_cap: np.float32) -> None:
    """c * tanh(x / c) of the first ``n_rows`` rows and ``n_columns`` columns."""
    inverse = np.float32(1.0) / soft_cap
    for r in range(n_rows):
        for t in range(n_columns):
            products_RT[r, t] = soft_cap * tanh_of(products_RT[r, t] * inverse)


@njit(parallel=True)
def _gather(kv: Rows, pages_T: Ints, n_cached: int, blocks_KBTD: Floats) -> None:
    n_kv_heads, n_blocks = blocks_KBTD.shape[:2]
    page_size, head_size = kv.shape[3], blocks_KBTD.shape[3]
    for task in numba.prange(n_kv_heads * n_blocks):
        head, block = task // n_blocks, task % n_blocks
        first = block * BLOCK_TOKENS
        for t in range(min(BLOCK_TOKENS, n_cached - first)):
            page, offset = pages_T[(first + t) // page_size], (first + t) % page_size
            scale = scale_of(kv[page, 1, head, offset])
            for d in range(head_size):
                blocks_KBTD[head, block, t, d] = scale * number(kv[page, 1, head, offset, d])


@njit(parallel=True)
def _gather_transposed(kv: Rows, pages_T: Ints, n_cached: int, head_size: int, blocks_KBCT: Floats) -> None:
    n_kv_heads, n_blocks = blocks_KBCT.shape[:2]
    page_size = kv.shape[3]
    for task in numba.prange(n_kv_heads * n_blocks):
        head, block = task // n_blocks, task % n_blocks
        first = block * BLOCK_TOKENS
        n_tokens = min(BLOCK_TOKENS, n_cached - first)
        k_TD = np.empty((n_tokens, head_size), np.float32)
        for t in range(n_tokens):
            page, offset = pages_T[(first + t) // page_size], (first + t) % page_size
            scale = scale_of(kv[page, 0, head, offset])
            for d in range(head_size):
                k_TD[t, d] = scale * number(kv[page, 0, head, offset, d])
        for d in range(head_size):
            for t in range(n_tokens):
                blocks_KBCT[head, block, d, t] = k_TD[t, d]
