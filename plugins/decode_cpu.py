"""Attention of one query per sequence to cached tokens, in place, on the CPU (numba).

A sequence's pages are divided into *parts*, whose number and ends depend on its length alone, so that results do not depend on
threads or on other sequences. A task is a part with all KV heads: the heads of a page are neighbours in memory, which is read
fast in long runs only. Within a part the keys of a *block* of pages are read, then their values, as in FlashAttention
(arXiv 2205.14135). Why so: docs/decisions/0048-decode-attention.md.
"""

import numba
import numpy as np

from trt_kv.plugins.chunk_blocks import FASTMATH, cap
from trt_kv.plugins.fast_math import exp_or_zero, fill
from trt_kv.plugins.jit import njit
from trt_kv.plugins.kv_rows import number, scale_of
from trt_kv.plugins.paging import Floats, Ints, Rows
from trt_kv.plugins.vectors import HEADS, WIDEST, add_rows, exponentiate, multiply_rows, vector_width

PART_TOKENS = 256
"""The most tokens of a part, as long as there are not more than ``MOST_PARTS``."""
MOST_PARTS = 64
BLOCK_TOKENS = 32
AHEAD_BYTES = 8192
"""How far in front of the rows that are read now memory is fetched."""

HIDDEN_LOGIT = np.float32(-np.inf)
NO_WINDOW = (0, np.zeros(0, np.int64), np.zeros((0, 0, 0), np.int64))
"""The arguments ``window``, ``positions_N`` and ``token_positions`` of ``attend_one`` if all tokens are visible."""


@njit()
def n_parts_of(n_tokens: int, page_size: int) -> int:
    """Parts of a sequence: an even number if there are pages enough, so that two threads have as much to do each."""
    pairs = (n_tokens + 2 * PART_TOKENS - 1) // (2 * PART_TOKENS)
    n_parts: int = min(2 * pairs, MOST_PARTS, (n_tokens + page_size - 1) // page_size)
    return n_parts


@njit()
def first_parts(kv_len_B: Ints, page_size: int) -> Ints:
    """The number of the first part of each sequence, and of all parts: [B + 1]."""
    first_B = np.zeros(len(kv_len_B) + 1, np.int64)
    for b in range(len(kv_len_B)):
        first_B[b + 1] = first_B[b] + n_parts_of(kv_len_B[b], page_size)
    return first_B


@njit()
def pages_of_part(part: int, n_tokens: int, page_size: int) -> tuple[int, int]:
    """The first page of a sequence's part, and the end."""
    n_pages, n_parts = (n_tokens + page_size - 1) // page_size, n_parts_of(n_tokens, page_size)
    return part * n_pages // n_parts, (part + 1) * n_pages // n_parts


@njit(fastmath=FASTMATH)
def multiply_page(
    q: Floats,
    q_at: int,
    n_heads: int,
    head_size: int,
    kv: Rows,
    page: int,
    head: int,
    ahead: int,
    n_rows: int,
    out: Floats,
    out_at: int,
) -> None:
    """``out[out_at + HEADS * s + g]``: products of the queries that begin at ``q_at`` with the keys of a page and KV head.

    Numbers up to ``WIDEST`` behind the last token are overwritten.
    """
    row = page * kv.strides[0] + head * kv.strides[2]
    multiply_rows(q, q_at, n_heads, head_size, kv, row, kv.strides[3], ahead, n_rows, out, out_at)
    n_whole = head_size - head_size % vector_width()
    if n_whole < head_size:
        for s in range(n_rows):
            for g in range(n_heads):
                rest = np.float32(0.0)
                for d in range(n_whole, head_size):
                    rest += q[q_at + g * head_size + d] * number(kv[page, 0, head, s, d])
                out[out_at + HEADS * s + g] += rest * scale_of(kv[page, 0, head, s])


@njit(fastmath=FASTMATH)
def add_page(
    weights: Floats,
    weights_at: int,
    n_heads: int,
    head_size: int,
    kv: Rows,
    page: int,
    head: int,
    ahead: int,
    n_rows: int,
    sums: Floats,
    sums_at: int,
) -> None:
    """Add a page's values of a KV head, each times its weight, to the sums of ``n_heads`` queries."""
    row = page * kv.strides[0] + kv.strides[1] + head * kv.strides[2]
    add_rows(weights, weights_at, n_heads, head_size, kv, row, kv.strides[3], ahead, n_rows, sums, sums_at)
    for d in range(head_size - head_size % vector_width(), head_size):
        for g in range(n_heads):
            rest = np.float32(0.0)
            for s in range(n_rows):
                weight = weights[weights_at + HEADS * s + g] * scale_of(kv[page, 1, head, s])
                rest += weight * number(kv[page, 1, head, s, d])
            sums[sums_at + g * head_size + d] += rest


@njit()
def _ahead(piece: int, pages_KT: Ints, block: int, block_end: int, end: int, kv: Rows) -> int:
    """Bytes from a piece (the keys or the values of a page and KV head) to one that is read about ``AHEAD_BYTES`` later.

    Pieces of a block are numbered in the order in which they are read: keys page by page, then values.
    """
    n_kv_heads, n_pages = len(pages_KT), block_end - block
    here = _offset(piece, pages_KT, block, n_pages, kv)
    piece += max(1, AHEAD_BYTES // (kv.shape[3] * kv.strides[3]))
    if piece >= 2 * n_pages * n_kv_heads:
        piece -= 2 * n_pages * n_kv_heads
        block, n_pages = block_end, min(n_pages, end - block_end)
        if piece >= 2 * n_pages * n_kv_heads:
            return 0
    ahead: int = _offset(piece, pages_KT, block, n_pages, kv) - here
    return ahead


@njit()
def _offset(piece: int, pages_KT: Ints, block: int, n_pages: int, kv: Rows) -> int:
    which, place = divmod(piece, n_pages * len(pages_KT))
    p, head = divmod(place, len(pages_KT))
    offset: int = pages_KT[head, block + p] * kv.strides[0] + which * kv.strides[1] + head * kv.strides[2]
    return offset


@njit()
def attend_one(
    q_NHD: Floats,
    rows_B: Ints,
    page_table_BKT: Ints,
    kv_len_B: Ints,
    kv: Rows,
    scale: np.float32,
    soft_cap: np.float32,
    window: int,
    positions_N: Ints,
    token_positions: Ints,
    out_NHD: Floats,
    lse_NH: Floats,
) -> None:
    """Row ``rows_B[b]`` of q attends in place to the first ``kv_len_B[b]`` tokens of its pages; each KV head has its own pages.

    With a ``window`` it sees those of them whose position is greater than ``positions_N`` of its row minus the window.
    The last axis of ``kv`` is contiguous.
    """
    first_B = first_parts(kv_len_B, kv.shape[3])
    n_heads, head_size = q_NHD.shape[1:]
    largest_IH = np.empty((first_B[-1], n_heads), np.float32)
    total_IH = np.empty((first_B[-1], n_heads), np.float32)
    sums_IHD = np.empty((first_B[-1], n_heads, head_size), np.float32)
    hides, last_hidden_B = window > 0, np.zeros(len(rows_B), np.int64)
    for b in range(len(rows_B) if hides else 0):
        last_hidden_B[b] = positions_N[rows_B[b]] - window
    _attend_parts(
        q_NHD,
        rows_B,
        page_table_BKT,
        kv_len_B,
        first_B,
        kv,
        scale,
        soft_cap,
        hides,
        last_hidden_B,
        token_positions,
        largest_IH,
        total_IH,
        sums_IHD,
    )
    _join_parts(rows_B, first_B, largest_IH, total_IH, sums_IHD, out_NHD, lse_NH)


@njit(parallel=True, fastmath=FASTMATH)
def _attend_parts(
    q_NHD: Floats,
    rows_B: Ints,
    page_table_BKT: Ints,
    kv_len_B: Ints,
    first_B: Ints,
    kv: Rows,
    scale: np.float32,
    soft_cap: np.float32,
    hides: bool,
    last_hidden_B: Ints,
    token_positions: Ints,
    largest_IH: Floats,
    total_IH: Floats,
    sums_IHD: Floats,
) -> None:
    """What ``_attend_part`` computes, of all parts of all sequences. A kernel of its own: the code of a part is long, and is
    compiled once for each parallel loop of a kernel.
    """
    n_heads, head_size = q_NHD.shape[1:]
    for i in numba.prange(first_B[-1]):
        b = np.searchsorted(first_B, i, side="right") - 1
        pages = pages_of_part(i - first_B[b], kv_len_B[b], kv.shape[3])
        q_HD = np.empty((n_heads, head_size), np.float32)
        for h in range(n_heads):
            for d in range(head_size):
                q_HD[h, d] = q_NHD[rows_B[b], h, d] * scale
        _attend_part(
            q_HD,
            page_table_BKT[b],
            kv_len_B[b],
            pages,
            kv,
            soft_cap,
            hides,
            last_hidden_B[b],
            token_positions,
            largest_IH[i],
            total_IH[i],
            sums_IHD[i],
        )


@njit(parallel=True, fastmath=FASTMATH)
def _join_parts(
    rows_B: Ints,
    first_B: Ints,
    largest_IH: Floats,
    total_IH: Floats,
    sums_IHD: Floats,
    out_NHD: Floats,
    lse_NH: Floats,
) -> None:
    """The output and the log-sum-exp of each row and head from those of its parts."""
    n_heads = out_NHD.shape[1]
    for task in numba.prange(len(rows_B) * n_heads):
        b, h = task // n_heads, task % n_heads
        parts = slice(first_B[b], first_B[b + 1])
        lse_NH[rows_B[b], h] = _join(largest_IH[parts, h], total_IH[parts, h], sums_IHD[parts, h], out_NHD[rows_B[b], h])


@njit(fastmath=FASTMATH, error_model="numpy")
def _join(largest_I: Floats, total_I: Floats, sums_ID: Floats, out_D: Floats) -> np.float32:
    """The output from all parts' sums; returns the log-sum-exp."""
    largest, total = largest_I.max(), np.float32(0.0)
    fill(out_D, 0, len(out_D), np.float32(0.0))
    for i in range(len(largest_I)):
        share = exp_or_zero(largest_I[i] - largest)
        total += share * total_I[i]
        for d in range(len(out_D)):
            out_D[d] += share * sums_ID[i, d]
    for d in range(len(out_D)):
        out_D[d] /= total
    lse: np.float32 = largest + np.log(total)
    return lse


@njit(fastmath=FASTMATH)
def _attend_part(
    q_HD: Floats,
    pages_KT: Ints,
    n_cached: int,
    part: tuple[int, int],
    kv: Rows,
    soft_cap: np.float32,
    hides: bool,
    last_hidden: int,
    token_positions: Ints,
    largest_H: Floats,
    total_H: Floats,
    sums_HD: Floats,
) -> None:
    """The largest logit, the sum of the weights relative to it, and their sum with values, over the pages of a part."""
    (n_heads, head_size), (n_kv_heads, page_size) = q_HD.shape, kv.shape[2:4]
    group = n_heads // n_kv_heads
    n_sets = (group + HEADS - 1) // HEADS  # of at most HEADS query heads
    block_pages = max(1, BLOCK_TOKENS // page_size)
    q, sums = q_HD.reshape(-1), sums_HD.reshape(-1)
    fill(sums, 0, len(sums), np.float32(0.0))
    largest_CL = np.full((n_kv_heads * n_sets, WIDEST), np.float32(-np.inf))
    total_CL = np.zeros((n_kv_heads * n_sets, WIDEST), np.float32)
    shrink_L = np.empty(WIDEST, np.float32)
    length = block_pages * page_size * HEADS + WIDEST
    weights_CL = np.zeros((n_kv_heads * n_sets, length), np.float32)
    weights = weights_CL.reshape(-1)
    for block in range(part[0], part[1], block_pages):
        block_end = min(block + block_pages, part[1])
        n_pages = block_end - block
        for piece in range(2 * n_pages * n_kv_heads):
            which, (p, head) = piece // (n_pages * n_kv_heads), divmod(piece % (n_pages * n_kv_heads), n_kv_heads)
            if which == 1 and p == 0 and head == 0:
                n_weights = (min(block_end * page_size, n_cached) - block * page_size) * HEADS
                if soft_cap > 0.0:
                    cap(weights_CL, len(weights_CL), n_weights, soft_cap)
                if hides:
                    _hide_before(weights_CL, n_weights, last_hidden, pages_KT[:, block:block_end], token_positions)
                n_filled = (n_weights + WIDEST - 1) // WIDEST * WIDEST
                for c in range(len(weights_CL)):
                    fill(weights_CL[c], n_weights, n_filled, HIDDEN_LOGIT)
                    exponentiate(weights_CL[c], n_filled, largest_CL[c], total_CL[c], shrink_L)
                    first = c // n_sets * group + c % n_sets * HEADS
                    for g in range(min(HEADS, group - c % n_sets * HEADS)):
                        if shrink_L[g] != 1.0:
                            for d in range(head_size):
                                sums_HD[first + g, d] *= shrink_L[g]
            page = pages_KT[head, block + p]
            n_rows = min(page_size, n_cached - (block + p) * page_size)
            ahead = _ahead(piece, pages_KT, block, block_end, part[1], kv)
            for j in range(n_sets):
                n, at = min(HEADS, group - j * HEADS), (head * group + j * HEADS) * head_size
                to = (head * n_sets + j) * length + p * page_size * HEADS
                if which == 0:
                    multiply_page(q, at, n, head_size, kv, page, head, ahead, n_rows, weights, to)
                else:
                    add_page(weights, to, n, head_size, kv, page, head, ahead, n_rows, sums, at)
    for h in range(n_heads):
        c, g = h // group * n_sets + h % group // HEADS, h % group % HEADS
        largest_H[h], total_H[h] = largest_CL[c, g], np.float32(0.0)
        for lane in range(g, vector_width(), HEADS):
            total_H[h] += total_CL[c, lane]


@njit()
def _hide_before(weights_CL: Floats, n_weights: int, last_hidden: int, pages_KT: Ints, token_positions: Ints) -> None:
    """-inf for the tokens at positions up to ``last_hidden``."""
    page_size = token_positions.shape[2]
    n_sets = len(weights_CL) // len(pages_KT)
    for c in range(len(weights_CL)):
        head = c // n_sets
        for s in range(n_weights // HEADS):
            if token_positions[pages_KT[head, s // page_size], head, s % page_size] <= last_hidden:
                fill(weights_CL[c], s * HEADS, (s + 1) * HEADS, HIDDEN_LOGIT)
