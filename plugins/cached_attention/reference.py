"""CachedAttention in plain fp32 loops."""

import numpy as np

from trt_kv.plugins.paging import Floats, Ints, gather_kv, gather_slots, pages_of


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
    n_tokens, n_heads, _ = q.shape
    n_kv_heads = kv.shape[2]
    for i in range(n_tokens):
        page, offset = divmod(int(slots[layer, i]), page_size)
        kv[page, 0, :, offset] = k[i]
        kv[page, 1, :, offset] = v[i]
        token_positions[page, :, offset] = positions[i]

    out = np.empty_like(q)
    lse = np.empty((n_tokens, n_heads), np.float32)
    for b in range(len(cu_tokens) - 1):
        n_cached = int(kv_len[layer, b])
        pages = pages_of(page_table, layer, b, n_cached, page_size)
        k_KSD, v_KSD = gather_kv(kv, pages, n_cached)
        positions_KS = gather_slots(token_positions, pages, n_cached)
        for i in range(cu_tokens[b], cu_tokens[b + 1]):
            for h in range(n_heads):
                kv_head = h * n_kv_heads // n_heads
                visible = positions_KS[kv_head] <= positions[i]
                products = k_KSD[kv_head, visible].astype(np.float32) * q[i, h].astype(np.float32)
                logits = products.sum(axis=1) * np.float32(scale)
                largest = logits.max()
                weights = np.exp(logits - largest)
                lse[i, h] = largest + np.log(weights.sum())
                out[i, h] = (weights[:, None] * v_KSD[kv_head, visible].astype(np.float32)).sum(axis=0) / weights.sum()
    return out, lse
