"""TokenScores on the CPU: column sums of the attention matrix, by torch's flash attention with exchanged roles."""

import numpy as np
import torch
from torch import Tensor

from trt_kv.plugins.paging import Floats, Ints, gather_kv, gather_slots, pages_of, scatter_slots


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
    """Sum over queries of the head-mean attention each cached token receives: [S] fp32. q is already scaled.

    Memory: O(H * N * T), T being the tokens from the first one on that some query may not see: this step's, as a rule.
    """
    n_queries, n_heads, head_size = q_NHD.shape
    n_kv_heads, n_cached, _ = k_KSD.shape
    group = n_heads // n_kv_heads
    q_KGND = torch.from_numpy(q_NHD).view(n_queries, n_kv_heads, group, head_size).permute(1, 2, 0, 3).contiguous()
    lse_KGN = torch.from_numpy(lse_NH).view(n_queries, n_kv_heads, group).permute(1, 2, 0)
    k_KSD_torch = torch.from_numpy(k_KSD)
    first = int(np.append(visible_NS.all(axis=0), False).argmin())
    hidden_TN = torch.from_numpy(~visible_NS[:, first:].T)
    bias_KGTN = (-lse_KGN)[:, :, None].masked_fill(hidden_TN, float("-inf"))
    received_S = torch.empty(n_cached)
    received_S[:first] = _sum_of_weights(q_KGND, k_KSD_torch[:, :first], -lse_KGN[:, :, None])
    received_S[first:] = _sum_of_weights(q_KGND, k_KSD_torch[:, first:], bias_KGTN).masked_fill_(hidden_TN.all(dim=1), 0.0)
    received: Floats = (received_S / n_heads).numpy()
    return received


def _sum_of_weights(q_KGND: Tensor, k_KTD: Tensor, bias: Tensor) -> Tensor:
    """sum over heads and queries of exp(q.k + bias) for each of T tokens: [T]; the bias is [K, G, T or 1, N].

    Let the keys ask and the queries answer: the sum over queries is then the softmax denominator of a key's row, which flash
    attention makes without ever holding a weight. What it would attend to is of no interest.
    """
    if k_KTD.shape[1] == 0:  # torch would divide by zero and kill the process
        return torch.zeros(0)
    k_KGTD = k_KTD[:, None].expand(-1, q_KGND.shape[1], -1, -1)
    _, log_sums_KGT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        k_KGTD, q_KGND, q_KGND, 0.0, False, attn_mask=bias.contiguous(), scale=1.0
    )
    sums_T: Tensor = log_sums_KGT.exp().sum(dim=(0, 1))
    return sums_T
