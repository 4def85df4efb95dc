"""TokenScores on the CPU: column sums of the attention matrix, block by block (numba).

A sequence with one token in the step is scored in place.
"""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.chunk_blocks import BLOCK_TOKENS, FASTMATH, STRIP_ROWS, cap, hide_later, key_blocks, multiply, query_rows
from trt_kv.plugins.decode_cpu import first_parts, multiply_page, pages_of_part
from trt_kv.plugins.fast_math import exp_nonpositive, exp_or_zero
from trt_kv.plugins.jit import njit
from trt_kv.plugins.kv_rows import head_size_of, number, scale_of
from trt_kv.plugins.paging import Floats, Ints, Rows, gather_slots, pages_of, scatter_slots
from trt_kv.plugins.token_scores.arguments import Arguments
from trt_kv.plugins.vectors import HEADS, WIDEST


def run(args: Arguments[NDArray[Any]]) -> tuple[()]:
    """Spec: ``spec.py``. Updates scores in place."""
    pages_N, offsets_N = np.divmod(args.slots[args.layer], args.page_size)
    args.scores[pages_N, :, offsets_N] = 0.0
    is_counted_N = (args.prompt_remaining >= 0) & ((args.prompt_remaining < args.window) | (args.window == 0))
    if args.generated:
        is_counted_N |= args.prompt_remaining == -1

    first_B, new_B = args.cu_tokens[:-1], np.diff(args.cu_tokens)
    ones = np.flatnonzero(new_B == 1)
    ones = ones[is_counted_N[first_B[ones]]]
    if len(ones):
        receive_one(
            args.q,
            args.lse,
            first_B[ones],
            args.page_table[args.layer, ones],
            args.kv_len[args.layer, ones],
            args.kv,
            np.float32(args.scale),
            np.float32(args.soft_cap),
            bool(args.per_head),
            bool(args.maximum),
            args.scores,
        )
    for b in np.flatnonzero(new_B > 0):
        n_cached = int(args.kv_len[args.layer, b])
        pages = pages_of(args.page_table, args.layer, b, n_cached, args.page_size)
        rows = first_B[b] + np.flatnonzero(is_counted_N[first_B[b] : args.cu_tokens[b + 1]])
        is_last = args.prompt_remaining[rows] == 0
        if (new_B[b] == 1 and not is_last.any()) or not len(rows):
            continue
        positions_KS = gather_slots(args.token_positions, pages, n_cached)
        scores_KS = gather_slots(args.scores, pages, n_cached)
        if new_B[b] > 1:
            received_KS = attention_received(
                args.q[rows],
                args.lse[rows],
                args.positions[rows],
                pages,
                args.kv,
                positions_KS,
                args.scale,
                soft_cap=args.soft_cap,
                maximum=bool(args.maximum),
            )
            if args.maximum:
                np.maximum(scores_KS, received_KS if args.per_head else received_KS.max(axis=0), out=scores_KS)
            else:
                scores_KS += received_KS if args.per_head else received_KS.mean(axis=0)
        if is_last.any():
            last = int(args.positions[rows[is_last]].max())
            if args.average:
                n_queries_KS = last + 1 - positions_KS
                scores_KS /= np.clip(n_queries_KS, 1, args.window or None).astype(np.float32)
            if args.pooling > 1:
                pool_neighbours(positions_KS, scores_KS, end=last - args.window, pooling=args.pooling)
            if args.value_norm:
                raise_to_mean(positions_KS, scores_KS, end=last - args.window)
                squares_KS = squares_of_values(args.kv, pages, n_cached)
                scores_KS *= np.sqrt(squares_KS if args.per_head else squares_KS.sum(axis=0))
        scatter_slots(args.scores, pages, scores_KS)
    return ()


def attention_received(
    q_NHD: Floats,
    lse_NH: Floats,
    positions_N: Ints,
    pages_T: Ints,
    kv: Rows,
    positions_KS: Ints,
    scale: float,
    *,
    soft_cap: float = 0.0,
    maximum: bool = False,
) -> Floats:
    """Attention that the first S slots of ``pages_T`` receive from a chunk's queries: [K, S] fp32.

    Summed over queries, mean over a KV head's query heads: token k receives sum_m exp(logit_mk - lse_m) of the queries m at its
    position or behind it; the logit is scale * q_m.k, capped by ``soft_cap``. ``maximum``: the largest over both instead.
    Memory: a copy of the slots' K.
    """
    n_kv_heads = len(positions_KS)
    group = q_NHD.shape[1] // n_kv_heads
    lse_KR = lse_NH.reshape(len(lse_NH), n_kv_heads, group).transpose(1, 0, 2).reshape(n_kv_heads, -1)
    received_KS = np.zeros(positions_KS.shape, np.float32)
    keys = key_blocks(kv, pages_T, positions_KS.shape[1])
    q_KRC = query_rows(q_NHD, n_kv_heads, scale)
    _receive_blocks(q_KRC, lse_KR, keys, positions_N, positions_KS, np.float32(soft_cap), maximum, received_KS)
    return received_KS if maximum else received_KS / np.float32(group)


@njit(parallel=True, fastmath=FASTMATH)
def _receive_blocks(
    q_KRC: Floats,
    lse_KR: Floats,
    k_KBCT: Floats,
    positions_N: Ints,
    positions_KS: Ints,
    soft_cap: np.float32,
    maximum: bool,
    received_KS: Floats,
) -> None:
    """One task per KV head and block of its tokens."""
    n_kv_heads, n_blocks = k_KBCT.shape[:2]
    n_rows, n_cached = q_KRC.shape[1], positions_KS.shape[1]
    positions_R = positions_N[np.arange(n_rows) // (n_rows // len(positions_N))]
    for task in numba.prange(n_kv_heads * n_blocks):
        head, block = task // n_blocks, task % n_blocks
        tokens = slice(block * BLOCK_TOKENS, min((block + 1) * BLOCK_TOKENS, n_cached))
        positions_T, received_T = positions_KS[head, tokens], received_KS[head, tokens]
        exponents_RT = np.empty((STRIP_ROWS, BLOCK_TOKENS), np.float32)
        for first in range(0, n_rows, STRIP_ROWS):
            strip = slice(first, first + STRIP_ROWS)
            lse_R = lse_KR[head, strip]
            if positions_T.min() > positions_R[strip].max():
                continue
            multiply(q_KRC[head, strip], k_KBCT[head, block], exponents_RT, len(positions_T))
            if soft_cap > 0.0:
                cap(exponents_RT, len(lse_R), len(positions_T), soft_cap)
            hide_later(exponents_RT, positions_R[strip], positions_T)
            for r in range(len(lse_R)):
                if maximum:
                    for t in range(len(positions_T)):
                        received_T[t] = max(received_T[t], exp_or_zero(exponents_RT[r, t] - lse_R[r]))
                else:
                    for t in range(len(positions_T)):
                        received_T[t] += exp_or_zero(exponents_RT[r, t] - lse_R[r])


def pool_neighbours(positions_KS: Ints, scores_KS: Floats, *, end: int, pooling: int) -> None:
    """In each head, replace the scores of tokens at positions up to ``end`` by the mean of ``pooling`` neighbours among them.

    Neighbours in order of position; missing ones count as zeros.
    """
    order_KS = np.argsort(positions_KS, axis=1, kind="stable")
    is_pooled_KS = positions_KS <= end
    reach = pooling // 2
    n_cached = positions_KS.shape[1]
    sorted_KS = np.take_along_axis(np.where(is_pooled_KS, scores_KS, np.float32(0.0)), order_KS, axis=1)
    padded = np.pad(sorted_KS, ((0, 0), (reach, reach)))
    means_KS = sum(padded[:, i : i + n_cached] for i in range(pooling)) / np.float32(pooling)
    pooled_KS = np.empty_like(scores_KS)
    np.put_along_axis(pooled_KS, order_KS, means_KS, axis=1)
    np.copyto(scores_KS, pooled_KS, where=is_pooled_KS)


def raise_to_mean(positions_KS: Ints, scores_KS: Floats, *, end: int) -> None:
    """In each head, raise the scores of tokens at positions up to ``end`` to at least their mean."""
    is_before_KS = positions_KS <= end
    n_K1 = np.maximum(is_before_KS.sum(axis=1, keepdims=True), 1).astype(np.float32)
    means_K1 = np.where(is_before_KS, scores_KS, np.float32(0.0)).sum(axis=1, keepdims=True) / n_K1
    np.maximum(scores_KS, means_K1, out=scores_KS, where=is_before_KS)


def squares_of_values(kv: Rows, pages_T: Ints, n_cached: int) -> Floats:
    """[K, S]: the squared L2 norm of the value in each of the first S slots of ``pages_T``."""
    squares_KS = np.empty((kv.shape[2], n_cached), np.float32)
    _square_values(kv, pages_T, head_size_of(kv), squares_KS)
    return squares_KS


@njit(parallel=True, fastmath=FASTMATH)
def _square_values(kv: Rows, pages_T: Ints, head_size: int, squares_KS: Floats) -> None:
    n_kv_heads, page_size = kv.shape[2:4]
    n_cached = squares_KS.shape[1]
    for p in numba.prange(len(pages_T)):
        for head in range(n_kv_heads):
            for s in range(p * page_size, min((p + 1) * page_size, n_cached)):
                row = kv[pages_T[p], 1, head, s - p * page_size]
                total, scale = np.float32(0.0), scale_of(row)
                for d in range(head_size):
                    total += number(row[d]) * number(row[d])
                squares_KS[head, s] = total * scale * scale


@njit(parallel=True, fastmath=FASTMATH)
def receive_one(
    q_NHD: Floats,
    lse_NH: Floats,
    rows_B: Ints,
    page_table_BT: Ints,
    kv_len_B: Ints,
    kv: Rows,
    scale: np.float32,
    soft_cap: np.float32,
    per_head: bool,
    maximum: bool,
    scores: Floats,
) -> None:
    """Add to ``scores`` the attention that the ``kv_len_B[b]`` tokens of sequence b receive from row ``rows_B[b]`` of q, or
    raise them to it (``maximum``).
    """
    page_size = kv.shape[3]
    first_B = first_parts(kv_len_B, page_size)
    for i in numba.prange(first_B[-1]):
        b = np.searchsorted(first_B, i, side="right") - 1
        first, end = pages_of_part(i - first_B[b], kv_len_B[b], page_size)
        q_HD = q_NHD[rows_B[b]] * scale
        for p in range(first, end):
            page, n_rows = page_table_BT[b, p], min(page_size, kv_len_B[b] - p * page_size)
            received_KS = _page_received(q_HD, lse_NH[rows_B[b]], kv, page, n_rows, soft_cap, maximum)
            for s in range(n_rows):
                if maximum:
                    most = received_KS[:, s].max()
                    for head in range(len(received_KS)):
                        scores[page, head, s] = max(scores[page, head, s], received_KS[head, s] if per_head else most)
                    continue
                mean = received_KS[:, s].sum() / np.float32(len(received_KS))
                for head in range(len(received_KS)):
                    scores[page, head, s] += received_KS[head, s] if per_head else mean


@njit(fastmath=FASTMATH)
def _page_received(
    q_HD: Floats, lse_H: Floats, kv: Rows, page: int, n_rows: int, soft_cap: np.float32, maximum: bool
) -> Floats:
    """Attention that a page's tokens receive from one query, the mean over the query heads of each KV head, or the largest
    (``maximum``): [K, n_rows].
    """
    n_heads, head_size = q_HD.shape
    n_kv_heads, page_size = kv.shape[2:4]
    group = n_heads // n_kv_heads
    received_KS = np.zeros((n_kv_heads, n_rows), np.float32)
    weights_1S = np.empty((1, page_size * HEADS + WIDEST), np.float32)
    for head in range(n_kv_heads):
        for first in range(head * group, (head + 1) * group, HEADS):
            n = min(HEADS, (head + 1) * group - first)
            multiply_page(q_HD.reshape(-1), first * head_size, n, head_size, kv, page, head, 0, n_rows, weights_1S[0], 0)
            if soft_cap > 0.0:
                cap(weights_1S, 1, n_rows * HEADS, soft_cap)
            for s in range(n_rows):
                for g in range(n):
                    weight = exp_nonpositive(weights_1S[0, s * HEADS + g] - lse_H[first + g])
                    if maximum:
                        received_KS[head, s] = max(received_KS[head, s], weight)
                    else:
                        received_KS[head, s] += weight / np.float32(group)
    return received_KS
