"""RecallAttention on the CPU, pages read in the pool where they lie."""

import numpy as np

from trt_kv.plugins.attention_cpu import append_tokens, attend_cached, attend_tables
from trt_kv.plugins.paging import Floats, Ints, pages_of
from trt_kv.plugins.recall_attention.choice import best_pages, drifted_heads, summaries_of
from trt_kv.plugins.recall_attention.page_counts import PageLimits, budget_tokens


def run(
    *,
    q: Floats,
    k: Floats,
    v: Floats,
    positions: Ints,
    cu_tokens: Ints,
    prompt_remaining: Ints,
    slots: Ints,
    page_table: Ints,
    kv_len: Ints,
    prompt_len: Ints,
    found_budget: Ints,
    query_rows: Ints,
    kv: Floats,
    token_positions: Ints,
    summaries: Floats,
    last_query: Floats,
    layer: int,
    scale: float,
    page_size: int,
    kept_share: float = 1.0,
    kept_tokens: int = 0,
    sinks: int = 0,
    recent: int = 1,
    tau: float = 0.8,
    summary: int = 0,
    pooling: int = 0,
    softmax_scale: float = 1.0,
) -> tuple[Floats, Floats, Ints]:
    """Spec: ``spec.py``. Returns (out [N, H, D], lse [N, H], corrected [B, K]); updates the states in place."""
    append_tokens(kv, token_positions, slots[layer], k, v, positions)
    limits = PageLimits(page_size=page_size, sinks=sinks, recent=recent)
    n_kv_heads = kv.shape[2]
    out, lse = np.empty(q.shape, np.float32), np.empty(q.shape[:2], np.float32)
    corrected = np.zeros((kv_len.shape[1], n_kv_heads), np.int64)
    decoding: list[tuple[int, Ints, int]] = []
    for b, n_new in enumerate(np.diff(cu_tokens)):
        if not n_new:
            continue
        n_cached, last = int(kv_len[layer, b]), int(cu_tokens[b + 1]) - 1
        pages = pages_of(page_table, layer, b, n_cached, page_size)
        filled = pages[(n_cached - n_new) // page_size : n_cached // page_size]
        summaries[filled] = summaries_of(kv[filled, 0], summary)
        row = query_rows[layer, b]
        if prompt_remaining[last] >= 0:
            chunk = slice(cu_tokens[b], cu_tokens[b + 1])
            out[chunk], lse[chunk] = attend_cached(q[chunk], positions[chunk], pages, n_cached, kv, token_positions, scale)
        else:
            budget = budget_tokens(int(prompt_len[b]), int(found_budget[layer, b]), kept_share, kept_tokens)
            drifted_K = drifted_heads(q[last], last_query[row], n_kv_heads, tau)
            probe_HD = np.where(np.repeat(drifted_K, q.shape[1] // n_kv_heads)[:, None], q[last], last_query[row])
            between = limits.choosable(n_cached)
            candidates = pages[between.start : between.stop]
            n_chosen = min(limits.n_chosen(budget), len(candidates))
            chosen_KC = between.start + best_pages(probe_HD, candidates, summaries, n_chosen, pooling, softmax_scale)
            attended_KT = pages[attended_pages(chosen_KC, limits, n_cached)]
            corrected[b] = drifted_K
            decoding.append((last, attended_KT, n_cached - (len(pages) - attended_KT.shape[1]) * page_size))
        last_query[row] = q[last]
    if decoding:
        attend_tables(q, decoding, kv, scale, out, lse)
    return out, lse, corrected


def attended_pages(chosen_KC: Ints, limits: PageLimits, n_tokens: int) -> Ints:
    """The pages, as numbers in the sequence, that each KV head attends to, in order: [K, T]."""
    n_pages = -(-n_tokens // limits.page_size)
    n_kv_heads = len(chosen_KC)
    first = max(limits.first_newest(n_tokens), min(limits.n_sinks, n_pages))
    ends = [np.arange(min(limits.n_sinks, n_pages)), np.arange(first, n_pages)]
    sinks_KT, newest_KT = (np.broadcast_to(pages, (n_kv_heads, len(pages))) for pages in ends)
    return np.concatenate([sinks_KT, chosen_KC, newest_KT], axis=1)
