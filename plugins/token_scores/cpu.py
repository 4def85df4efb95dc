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
    page_size: int,
    window: int = 0,
) -> tuple[()]:
    """Spec: ``spec.py``. Updates scores in place."""
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

    Token k receives sum_m exp(q_m.k - lse_m). With -lse as one more channel of q and 1 as one more channel of k, that is what
    flash attention calls the denominator of row k when keys ask and queries answer; it makes it without ever holding a weight.
    Memory: O(N * T), T being the tokens from the first one on that some query may not see: this step's, as a rule.
    """
    n_queries, n_heads, _ = q_NHD.shape
    n_kv_heads, n_cached, _ = k_KSD.shape
    q_NHC = np.concatenate([q_NHD, -lse_NH[:, :, None]], axis=2)
    k_KSC = torch.from_numpy(np.concatenate([k_KSD, np.ones_like(k_KSD[:, :, :1])], axis=2))
    q_KGNC = torch.from_numpy(q_NHC).view(n_queries, n_kv_heads, n_heads // n_kv_heads, -1).permute(1, 2, 0, 3).contiguous()
    first = int(np.append(visible_NS.all(axis=0), False).argmin())
    hidden_TN = torch.from_numpy(~visible_NS[:, first:].T)
    mask_TN = torch.zeros(hidden_TN.shape).masked_fill_(hidden_TN, float("-inf"))
    received_S = torch.empty(n_cached)
    received_S[:first] = _denominators(k_KSC[:, :first], q_KGNC)
    received_S[first:] = _denominators(k_KSC[:, first:], q_KGNC, mask_TN).masked_fill_(hidden_TN.all(dim=1), 0.0)
    received: Floats = (received_S / n_heads).numpy()
    return received


def _denominators(k_KTC: Tensor, q_KGNC: Tensor, mask_TN: Tensor | None = None) -> Tensor:
    """sum over heads and queries of exp(q.k + mask) for each of T tokens: [T]."""
    if k_KTC.shape[1] == 0:  # torch would divide by zero and kill the process
        return torch.zeros(0)
    k_KGTC = k_KTC[:, None].expand(-1, q_KGNC.shape[1], -1, -1)
    mask = None if mask_TN is None else mask_TN[None, None]
    _, log_sums_KGT = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        k_KGTC, q_KGNC, q_KGNC, 0.0, False, attn_mask=mask, scale=1.0
    )
    sums_T: Tensor = log_sums_KGT.exp().sum(dim=(0, 1))
    return sums_T
