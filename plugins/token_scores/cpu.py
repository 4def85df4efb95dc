"""TokenScores on the CPU: softmax weights are rebuilt from q, K and lse in blocks of rows, summed and forgotten."""

import numpy as np
import torch

from trt_kv.plugins.paging import Floats, Ints, gather_kv, gather_slots, pages_of, scatter_slots

BLOCK_ELEMENTS = 1 << 20
"""Attention weights alive at once (4 MiB): large enough for the GEMM, small enough to stay in cache."""


def run(
    *,
    q: Floats,
    lse: Floats,
    positions: Ints,
    cu_tokens: Ints,
    prompt_remaining: Ints,
    slots: Ints,
    page_table: Ints,
    kv_len: Ints,
    kv: Floats,
    token_positions: Ints,
    scores: Floats,
    layer: int,
    scale: float,
    window: int = 0,
) -> tuple[()]:
    """Spec: ``spec.py``. Updates scores in place."""
    page_size = kv.shape[3]
    pages_N, offsets_N = np.divmod(slots[layer], page_size)
    scores[pages_N, offsets_N] = 0.0
    counts_N = (prompt_remaining >= 0) & ((prompt_remaining < window) | (window == 0))
    for b in range(len(cu_tokens) - 1):
        rows = np.flatnonzero(counts_N[cu_tokens[b] : cu_tokens[b + 1]]) + cu_tokens[b]
        if not len(rows):
            continue
        n_cached = int(kv_len[layer, b])
        pages = pages_of(page_table, layer, b, n_cached, page_size)
        k_KSD, _ = gather_kv(kv, pages, n_cached)
        visible_NS = gather_slots(token_positions, pages, n_cached) <= positions[rows, None]
        received_S = attention_received(q[rows] * np.float32(scale), lse[rows], k_KSD, visible_NS)
        scatter_slots(scores, pages, gather_slots(scores, pages, n_cached) + received_S)
    return ()


def attention_received(q_NHD: Floats, lse_NH: Floats, k_KSD: Floats, visible_NS: np.ndarray) -> Floats:
    """Sum over queries of the head-mean attention each cached token receives: [S] fp32. q is already scaled."""
    n_queries, n_heads, head_size = q_NHD.shape
    n_kv_heads, n_cached, _ = k_KSD.shape
    group = n_heads // n_kv_heads
    q_NKGD = torch.from_numpy(q_NHD).view(n_queries, n_kv_heads, group, head_size)
    lse_NKG = torch.from_numpy(lse_NH).view(n_queries, n_kv_heads, group)
    k_KDS = torch.from_numpy(k_KSD).transpose(1, 2)
    hidden_NS = torch.from_numpy(~visible_NS)
    received_S = torch.zeros(n_cached)
    step = max(1, BLOCK_ELEMENTS // (group * n_cached))
    for start in range(0, n_queries, step):
        block = slice(start, start + step)
        for head in range(n_kv_heads):
            log_weights = q_NKGD[block, head].reshape(-1, head_size) @ k_KDS[head]
            log_weights.view(-1, group, n_cached).sub_(lse_NKG[block, head, :, None])
            log_weights.view(-1, group, n_cached).masked_fill_(hidden_NS[block, None], float("-inf"))
            received_S += log_weights.exp_().sum(dim=0)
    received: Floats = (received_S / n_heads).numpy()
    return received
