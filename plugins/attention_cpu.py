"""Attention on the CPU, shared by the ops that attend: a chunk of queries in blocks (numba), one query by ``decode_cpu``.

Why two kernels: docs/decisions/0004-cpu-kernels.md.
"""

from collections.abc import Sequence

import numba
import numpy as np

from trt_kv.plugins.chunk_blocks import (
    BLOCK_TOKENS,
    FASTMATH,
    STRIP_ROWS,
    TILE_ROWS,
    add_product,
    cap,
    hide_earlier,
    hide_later,
    key_blocks,
    multiply,
    query_rows,
    value_blocks,
    visible_end,
)
from trt_kv.plugins.decode_cpu import NO_WINDOW, attend_one
from trt_kv.plugins.fast_math import fill
from trt_kv.plugins.jit import njit
from trt_kv.plugins.kv_rows import put
from trt_kv.plugins.paging import Floats, Ints, Rows, gather_slots
from trt_kv.plugins.vector_softmax import exponentiate_rows
from trt_kv.plugins.vectors import WIDEST


@njit()
def append_tokens(kv: Rows, token_positions: Ints, slots_N: Ints, k_NKD: Floats, v_NKD: Floats, positions_N: Ints) -> None:
    """Write this step's tokens to their slots, the same in all KV heads, in the type of the pool."""
    write_rows(kv, slots_N, k_NKD, v_NKD)
    page_size = kv.shape[3]
    for n in range(len(slots_N)):
        for head in range(kv.shape[2]):
            token_positions[slots_N[n] // page_size, head, slots_N[n] % page_size] = positions_N[n]


@njit()
def write_rows(kv: Rows, slots_N: Ints, k_NKD: Floats, v_NKD: Floats) -> None:
    """Store keys and values in slots of ``kv`` [M, 2, K, P, W] (page * P + offset), with the bits of ``kv_rows.store``."""
    page_size = kv.shape[3]
    for n in range(len(slots_N)):
        page, offset = slots_N[n] // page_size, slots_N[n] % page_size
        for head in range(kv.shape[2]):
            put(kv[page, 0, head, offset], k_NKD[n, head])
            put(kv[page, 1, head, offset], v_NKD[n, head])


def attend_cached(
    q_NHD: Floats,
    positions_N: Ints,
    pages_T: Ints,
    n_cached: int,
    kv: Rows,
    token_positions: Ints,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> tuple[Floats, Floats]:
    """A chunk of one sequence attends to its ``n_cached`` tokens, itself included: (out [N, H, D], lse [N, H]), fp32."""
    positions_KS = gather_slots(token_positions, pages_T, n_cached)
    return attend_chunk(q_NHD, positions_N, pages_T, kv, positions_KS, scale, window=window, soft_cap=soft_cap)


def attend_chunk(
    q_NHD: Floats,
    positions_N: Ints,
    pages_T: Ints,
    kv: Rows,
    positions_KS: Ints,
    scale: float,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> tuple[Floats, Floats]:
    """Attention of one sequence's chunk to the first S slots of ``pages_T``: (out [N, H, D], lse [N, H]), fp32.

    A query sees the slots whose positions, per KV head, are not greater than its own, and with a ``window`` greater than its
    own minus the window; it must see one. ``soft_cap``: as in CachedAttention. Memory: a copy of the slots' K and V. As
    FlashAttention (arXiv 2205.14135, algorithm 1), with the rows of grouped queries side by side.
    """
    out, lse = np.empty(q_NHD.shape, np.float32), np.empty(q_NHD.shape[:2], np.float32)
    n_cached = positions_KS.shape[1]
    k_KBCT, v_KBTD = key_blocks(kv, pages_T, n_cached), value_blocks(kv, pages_T, n_cached)
    q_KRC, cap_of_logits = query_rows(q_NHD, len(k_KBCT), scale), np.float32(soft_cap)
    _attend_blocks(q_KRC, k_KBCT, v_KBTD, positions_N, positions_KS, window, cap_of_logits, out, lse)
    return out, lse


@njit(parallel=True, fastmath=FASTMATH)
def _attend_blocks(
    q_KRC: Floats,
    k_KBCT: Floats,
    v_KBTD: Floats,
    positions_N: Ints,
    positions_KS: Ints,
    window: int,
    soft_cap: np.float32,
    out_NHD: Floats,
    lse_NH: Floats,
) -> None:
    """One task per KV head and tile of rows. A block stays in the CPU's cache for all strips of the tile."""
    n_kv_heads, n_rows, _ = q_KRC.shape
    group = n_rows // len(positions_N)
    n_tiles = (n_rows + TILE_ROWS - 1) // TILE_ROWS
    for task in numba.prange(n_kv_heads * n_tiles):
        head, first_row = task // n_tiles, _tile(task % n_tiles, n_tiles) * TILE_ROWS
        q_RC = q_KRC[head, first_row : first_row + TILE_ROWS]
        _attend_tile(
            q_RC,
            k_KBCT[head],
            v_KBTD[head],
            positions_N,
            positions_KS[head],
            window,
            soft_cap,
            first_row,
            group,
            out_NHD[:, head * group : (head + 1) * group],
            lse_NH[:, head * group : (head + 1) * group],
        )


@njit()
def _tile(i: int, n_tiles: int) -> int:
    """First and last tiles in turns: later ones see more tokens, and a thread gets tasks that follow one another."""
    return n_tiles - 1 - i // 2 if i % 2 else i // 2


@njit(fastmath=FASTMATH, error_model="numpy")
def _attend_tile(
    q_RC: Floats,
    k_BCT: Floats,
    v_BTD: Floats,
    positions_N: Ints,
    positions_S: Ints,
    window: int,
    soft_cap: np.float32,
    first_row: int,
    group: int,
    out_NGD: Floats,
    lse_NG: Floats,
) -> None:
    """Rows from ``first_row`` on attend to the blocks of their KV head. Row r is query head r % group of token r // group."""
    n_cached, head_size = len(positions_S), v_BTD.shape[2]
    positions_R = np.empty(len(q_RC), np.int64)
    largest_R = np.empty(len(q_RC), np.float32)
    total_R = np.zeros(len(q_RC), np.float32)
    sums_RD = np.zeros((len(q_RC), head_size), np.float32)
    shrink_R = np.empty(STRIP_ROWS, np.float32)
    weights_RT = np.empty((STRIP_ROWS, BLOCK_TOKENS), np.float32)
    for r in range(len(q_RC)):
        positions_R[r] = positions_N[(first_row + r) // group]
        largest_R[r] = -np.inf
    for block in range(len(k_BCT)):
        positions_T = positions_S[block * BLOCK_TOKENS : min((block + 1) * BLOCK_TOKENS, n_cached)]
        if positions_T.min() > positions_R.max() or (window > 0 and positions_T.max() <= positions_R.min() - window):
            continue
        for first in range(0, len(q_RC), STRIP_ROWS):
            strip = slice(first, first + STRIP_ROWS)
            seen_T = positions_T[: visible_end(positions_R[strip], positions_T)]
            n_rows, n_seen = len(positions_R[strip]), len(seen_T)
            if n_seen == 0:
                continue
            multiply(q_RC[strip], k_BCT[block], weights_RT, n_seen)
            if soft_cap > 0.0:
                cap(weights_RT, n_rows, n_seen, soft_cap)
            hide_later(weights_RT, positions_R[strip], seen_T)
            if window > 0:
                hide_earlier(weights_RT, positions_R[strip], seen_T, window)
            n_filled = (n_seen + WIDEST - 1) // WIDEST * WIDEST
            for r in range(n_rows):
                fill(weights_RT[r], n_seen, n_filled, np.float32(-np.inf))
            exponentiate_rows(weights_RT, n_rows, n_filled, largest_R[strip], total_R[strip], shrink_R)
            for r in range(n_rows):
                if shrink_R[r] != 1.0:
                    for d in range(head_size):
                        sums_RD[first + r, d] *= shrink_R[r]
            add_product(weights_RT, v_BTD[block], sums_RD[strip], n_seen, head_size)
    for r in range(len(q_RC)):
        n, g = (first_row + r) // group, (first_row + r) % group
        lse_NG[n, g] = largest_R[r] + np.log(total_R[r])
        for d in range(head_size):
            out_NGD[n, g, d] = sums_RD[r, d] / total_R[r]


def attend_tables(
    q_NHD: Floats,
    entries: Sequence[tuple[int, Ints, int]],
    kv: Rows,
    scale: float,
    soft_cap: float,
    out_NHD: Floats,
    lse_NH: Floats,
) -> None:
    """One query per entry (row of q, pages [K, T] of each KV head, tokens in them) attends to its pages; fills out and lse."""
    width = max(pages_KT.shape[1] for _, pages_KT, _ in entries)
    table_BKT = np.zeros((len(entries), kv.shape[2], width), np.int64)
    for i, (_, pages_KT, _) in enumerate(entries):
        table_BKT[i, :, : pages_KT.shape[1]] = pages_KT
    rows_B, n_tokens_B = (np.array([entry[at] for entry in entries]) for at in (0, 2))
    attend_one(q_NHD, rows_B, table_BKT, n_tokens_B, kv, np.float32(scale), np.float32(soft_cap), *NO_WINDOW, out_NHD, lse_NH)
