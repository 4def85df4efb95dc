"""Attention on the CPU, shared by the ops that attend: one query over pages in place (numba), a chunk of queries (torch).

Why two kernels: docs/decisions/0004-cpu-kernels.md.
"""

from collections.abc import Sequence

import numba
import numpy as np
import torch

from trt_kv.plugins.fast_math import exp_nonpositive
from trt_kv.plugins.jit import njit
from trt_kv.plugins.paging import Floats, Ints, gather_kv, gather_slots, head_groups


def append_tokens(kv: Floats, token_positions: Ints, slots_N: Ints, k_NKD: Floats, v_NKD: Floats, positions_N: Ints) -> None:
    """Write this step's tokens to their slots, the same in all KV heads."""
    pages_N, offsets_N = np.divmod(slots_N, kv.shape[3])
    kv[pages_N, 0, :, offsets_N] = k_NKD
    kv[pages_N, 1, :, offsets_N] = v_NKD
    token_positions[pages_N, :, offsets_N] = positions_N[:, None]


def attend_cached(
    q_NHD: Floats, positions_N: Ints, pages_T: Ints, n_cached: int, kv: Floats, token_positions: Ints, scale: float
) -> tuple[Floats, Floats]:
    """A chunk of one sequence attends to its ``n_cached`` tokens, itself included: (out [N, H, D], lse [N, H]), fp32."""
    out, lse = np.empty(q_NHD.shape, np.float32), np.empty(q_NHD.shape[:2], np.float32)
    group = q_NHD.shape[1] // kv.shape[2]
    k_KSD, v_KSD = gather_kv(kv, pages_T, n_cached)
    positions_KS = gather_slots(token_positions, pages_T, n_cached)
    for kv_heads in head_groups(positions_KS):
        heads = slice(kv_heads.start * group, kv_heads.stop * group)
        visible_NS = positions_KS[kv_heads.start] <= positions_N[:, None]
        out[:, heads], lse[:, heads] = attend_chunk(q_NHD[:, heads], k_KSD[kv_heads], v_KSD[kv_heads], visible_NS, scale)
    return out, lse


def attend_chunk(
    q_NHD: Floats, k_KSD: Floats, v_KSD: Floats, visible_NS: np.ndarray | None, scale: float
) -> tuple[Floats, Floats]:
    """Attention of one sequence's chunk, KV heads as batch so that grouped queries share K and V without a copy.

    ``visible_NS`` None: every query sees every token. Returns (out [N, H, D], lse [N, H]), both fp32. Memory: O(N * S) bytes
    for the mask only.
    """
    n_tokens, n_heads, head_size = q_NHD.shape
    n_kv_heads, n_cached, _ = k_KSD.shape
    group = n_heads // n_kv_heads
    q_KGND = torch.from_numpy(q_NHD).view(n_tokens, n_kv_heads, group, head_size).permute(1, 2, 0, 3)
    k_KGSD = torch.from_numpy(k_KSD)[:, None].expand(-1, group, -1, -1)
    v_KGSD = torch.from_numpy(v_KSD)[:, None].expand(-1, group, -1, -1)
    mask_11NS = None
    if visible_NS is not None:
        hidden_NS = torch.from_numpy(~visible_NS)
        mask_11NS = torch.zeros(n_tokens, n_cached).masked_fill_(hidden_NS, float("-inf"))[None, None]
    out_KGND, lse_KGN = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_KGND, k_KGSD, v_KGSD, 0.0, False, attn_mask=mask_11NS, scale=scale
    )
    out = out_KGND.permute(2, 0, 1, 3).reshape(n_tokens, n_heads, head_size)
    lse = lse_KGN.permute(2, 0, 1).reshape(n_tokens, n_heads)
    return out.numpy(), lse.numpy()


def attend_tables(
    q_NHD: Floats, entries: Sequence[tuple[int, Ints, int]], kv: Floats, scale: float, out_NHD: Floats, lse_NH: Floats
) -> None:
    """One query per entry (row of q, pages [K, T] of each KV head, tokens in them) attends to its pages; fills out and lse."""
    width = max(pages_KT.shape[1] for _, pages_KT, _ in entries)
    table_BKT = np.zeros((len(entries), kv.shape[2], width), np.int64)
    for i, (_, pages_KT, _) in enumerate(entries):
        table_BKT[i, :, : pages_KT.shape[1]] = pages_KT
    rows_B, n_tokens_B = (np.array([entry[at] for entry in entries]) for at in (0, 2))
    attend_one(q_NHD, rows_B, table_BKT, n_tokens_B, kv, np.float32(scale), out_NHD, lse_NH)


@njit(parallel=True, fastmath={"contract", "reassoc", "nsz", "arcp"})
def attend_one(
    q_NHD: Floats,
    rows_B: Ints,
    page_table_BKT: Ints,
    kv_len_B: Ints,
    kv: Floats,
    scale: np.float32,
    out_NHD: Floats,
    lse_NH: Floats,
) -> None:
    """Row ``rows_B[b]`` of q attends in place to the first ``kv_len_B[b]`` tokens of its pages; each KV head has its own pages.

    One task per (sequence, KV head): a page-head is contiguous and is read once for the whole query group.
    """
    n_kv_heads, page_size, head_size = kv.shape[2:]
    group = q_NHD.shape[1] // n_kv_heads
    for task in numba.prange(len(rows_B) * n_kv_heads):
        b = task // n_kv_heads
        head = task % n_kv_heads
        row = rows_B[b]
        n_cached = kv_len_B[b]
        n_pages = (n_cached + page_size - 1) // page_size
        weights = np.empty((group, n_cached), np.float32)
        for p in range(n_pages):
            page = page_table_BKT[b, head, p]
            for g in range(group):
                for s in range(min(page_size, n_cached - p * page_size)):
                    dot = np.float32(0.0)
                    for d in range(head_size):
                        dot += q_NHD[row, head * group + g, d] * kv[page, 0, head, s, d]
                    weights[g, p * page_size + s] = dot * scale
        for g in range(group):
            largest = weights[g].max()
            total = np.float32(0.0)
            for s in range(n_cached):
                weights[g, s] = exp_nonpositive(weights[g, s] - largest)
                total += weights[g, s]
            for s in range(n_cached):
                weights[g, s] /= total
            lse_NH[row, head * group + g] = largest + np.log(total)
        sums = np.zeros((group, head_size), np.float32)
        for p in range(n_pages):
            page = page_table_BKT[b, head, p]
            for g in range(group):
                for s in range(min(page_size, n_cached - p * page_size)):
                    weight = weights[g, p * page_size + s]
                    for d in range(head_size):
                        sums[g, d] += weight * kv[page, 1, head, s, d]
        out_NHD[row, head * group : (head + 1) * group] = sums
