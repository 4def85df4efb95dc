"""TokenScores in plain fp32 loops."""

import numpy as np

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
    n_heads = q.shape[1]
    n_kv_heads = kv.shape[2]
    for slot in slots[layer]:
        scores[divmod(int(slot), page_size)] = 0.0
    for b in range(len(cu_tokens) - 1):
        n_cached = int(kv_len[layer, b])
        pages = pages_of(page_table, layer, b, n_cached, page_size)
        k_KSD, _ = gather_kv(kv, pages, n_cached)
        positions_S = gather_slots(token_positions, pages, n_cached)
        scores_S = gather_slots(scores, pages, n_cached)
        for i in range(cu_tokens[b], cu_tokens[b + 1]):
            if prompt_remaining[i] < 0 or (window and prompt_remaining[i] >= window):
                continue
            visible = positions_S <= positions[i]
            for h in range(n_heads):
                logits = (k_KSD[h * n_kv_heads // n_heads, visible] * q[i, h]).sum(axis=1) * np.float32(scale)
                scores_S[visible] += np.exp(logits - lse[i, h]) / n_heads
        scatter_slots(scores, pages, scores_S)
    return ()
