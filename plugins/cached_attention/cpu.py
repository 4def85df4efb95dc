"""CachedAttention on the CPU: one-token sequences read their pages in place (numba); chunks go through torch's flash attention.

Why two kernels: docs/decisions/0004-cpu-kernels.md.
"""

import numba
import numpy as np
import torch

from trt_kv.plugins.fast_math import exp_nonpositive
from trt_kv.plugins.paging import Floats, Ints, gather_kv, gather_slots, head_groups, pages_of


def run(
    *,
    q: Floats,
    k: Floats,
    v: Floats,
    positions: Ints,
    cu_tokens: Ints,
    slots: Ints,
    page_table: Ints,
    kv_len: Ints,
    kv: Floats,
    token_positions: Ints,
    layer: int,
    scale: float,
    page_size: int,
) -> tuple[Floats, Floats]:
    """Spec: ``spec.py``. Returns (out [N, H, D], lse [N, H]); updates kv and token_positions in place."""
    pages_N, offsets_N = np.divmod(slots[layer], page_size)
    kv[pages_N, 0, :, offsets_N] = k
    kv[pages_N, 1, :, offsets_N] = v
    token_positions[pages_N, :, offsets_N] = positions[:, None]

    out = np.empty(q.shape, np.float32)
    lse = np.empty(q.shape[:2], np.float32)
    group = q.shape[1] // kv.shape[2]
    new_B = np.diff(cu_tokens)
    decoding = np.flatnonzero(new_B == 1)
    if len(decoding):
        rows = cu_tokens[decoding]
        attend_one(q, rows, page_table[layer, decoding], kv_len[layer, decoding], kv, np.float32(scale), out, lse)
    for b in np.flatnonzero(new_B > 1):
        chunk = slice(cu_tokens[b], cu_tokens[b + 1])
        n_cached = int(kv_len[layer, b])
        pages = pages_of(page_table, layer, b, n_cached, page_size)
        k_KSD, v_KSD = gather_kv(kv, pages, n_cached)
        positions_KS = gather_slots(token_positions, pages, n_cached)
        for kv_heads in head_groups(positions_KS):
            heads = slice(kv_heads.start * group, kv_heads.stop * group)
            visible_NS = positions_KS[kv_heads.start] <= positions[chunk, None]
            out[chunk, heads], lse[chunk, heads] = attend_chunk(
                q[chunk, heads], k_KSD[kv_heads], v_KSD[kv_heads], visible_NS, scale
            )
    return out, lse


def attend_chunk(q_NHD: Floats, k_KSD: Floats, v_KSD: Floats, visible_NS: np.ndarray, scale: float) -> tuple[Floats, Floats]:
    """Attention of one sequence's chunk, KV heads as batch so that grouped queries share K and V without a copy.

    Returns (out [N, H, D], lse [N, H]), both fp32. Memory: O(N * S) bytes for the mask, nothing else grows with N * S.
    """
    n_tokens, n_heads, head_size = q_NHD.shape
    n_kv_heads, n_cached, _ = k_KSD.shape
    group = n_heads // n_kv_heads
    q_KGND = torch.from_numpy(q_NHD).view(n_tokens, n_kv_heads, group, head_size).permute(1, 2, 0, 3)
    k_KGSD = torch.from_numpy(k_KSD)[:, None].expand(-1, group, -1, -1)
    v_KGSD = torch.from_numpy(v_KSD)[:, None].expand(-1, group, -1, -1)
    mask_NS = torch.zeros(n_tokens, n_cached).masked_fill_(torch.from_numpy(~visible_NS), float("-inf"))
    out_KGND, lse_KGN = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q_KGND, k_KGSD, v_KGSD, 0.0, False, attn_mask=mask_NS[None, None], scale=scale
    )
    out = out_KGND.permute(2, 0, 1, 3).reshape(n_tokens, n_heads, head_size)
    lse = lse_KGN.permute(2, 0, 1).reshape(n_tokens, n_heads)
    return out.numpy(), lse.numpy()


@numba.njit(parallel=True, fastmath={"contract", "reassoc", "nsz", "arcp"}, cache=True)
def attend_one(
    q_NHD: Floats,
    rows_B: Ints,
    page_table_BT: Ints,
    kv_len_B: Ints,
    kv: Floats,
    scale: np.float32,
    out_NHD: Floats,
    lse_NH: Floats,
) -> None:
    """Row ``rows_B[b]`` of q attends to all ``kv_len_B[b]`` cached tokens of sequence b, pages read where they lie.

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
            page = page_table_BT[b, p]
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
            page = page_table_BT[b, p]
            for g in range(group):
                for s in range(min(page_size, n_cached - p * page_size)):
                    weight = weights[g, p * page_size + s]
                    for d in range(head_size):
                        sums[g, d] += weight * kv[page, 1, head, s, d]
        out_NHD[row, head * group : (head + 1) * group] = sums
