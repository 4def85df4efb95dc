"""RecallAttention on the CPU, with pages read in place from the pool."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.attention_cpu import append_tokens, attend_cached, attend_tables
from trt_kv.plugins.kv_rows import dtype_of
from trt_kv.plugins.paging import Floats, Ints, pages_of
from trt_kv.plugins.recall_attention.arguments import Arguments
from trt_kv.plugins.recall_attention.choice import best_pages, drifted_heads, summaries_of
from trt_kv.plugins.recall_attention.page_counts import PageLimits, budget_tokens


def run(args: Arguments[NDArray[Any]]) -> tuple[Floats, Floats, Ints]:
    """Spec: ``spec.py``. Returns (out [N, H, D], lse [N, H], corrected [B, K]); updates the states in place."""
    append_tokens(args.kv, args.token_positions, args.slots[args.layer], args.k, args.v, args.positions)
    limits = PageLimits(page_size=args.page_size, sinks=args.sinks, recent=args.recent)
    n_kv_heads = args.kv.shape[2]
    out, lse = np.empty(args.q.shape, np.float32), np.empty(args.q.shape[:2], np.float32)
    corrected = np.zeros((args.kv_len.shape[1], n_kv_heads), np.int64)
    decoding: list[tuple[int, Ints, int]] = []
    for b, n_new in enumerate(np.diff(args.cu_tokens)):
        if not n_new:
            continue
        n_cached, last = int(args.kv_len[args.layer, b]), int(args.cu_tokens[b + 1]) - 1
        pages = pages_of(args.page_table, args.layer, b, n_cached, args.page_size)
        filled = pages[(n_cached - n_new) // args.page_size : n_cached // args.page_size]
        args.summaries[filled] = summaries_of(args.kv[filled, 0], args.summary, dtype_of(args.summaries))
        row = args.query_rows[args.layer, b]
        if args.prompt_remaining[last] >= 0:
            chunk = slice(args.cu_tokens[b], args.cu_tokens[b + 1])
            out[chunk], lse[chunk] = attend_cached(
                args.q[chunk],
                args.positions[chunk],
                pages,
                n_cached,
                args.kv,
                args.token_positions,
                args.scale,
                soft_cap=args.soft_cap,
            )
        else:
            budget = budget_tokens(
                int(args.prompt_len[b]), int(args.adaptive_budget[args.layer, b]), args.kept_share, args.kept_tokens
            )
            drifted_K = drifted_heads(args.q[last], args.last_query[row], n_kv_heads, args.tau)
            probe_HD = np.where(
                np.repeat(drifted_K, args.q.shape[1] // n_kv_heads)[:, None], args.q[last], args.last_query[row]
            )
            between = limits.choosable(n_cached)
            candidates = pages[between.start : between.stop]
            n_chosen = min(limits.n_chosen(budget), len(candidates))
            chosen_KC = between.start + best_pages(
                probe_HD, candidates, args.summaries, n_chosen, args.pooling, args.softmax_scale
            )
            attended_KT = pages[attended_pages(chosen_KC, limits, n_cached)]
            corrected[b] = drifted_K
            decoding.append((last, attended_KT, n_cached - (len(pages) - attended_KT.shape[1]) * args.page_size))
        args.last_query[row] = args.q[last]
    if decoding:
        attend_tables(args.q, decoding, args.kv, args.scale, args.soft_cap, out, lse)
    return out, lse, corrected


def attended_pages(chosen_KC: Ints, limits: PageLimits, n_tokens: int) -> Ints:
    """The pages that each KV head attends to, as indices within the sequence, in order: [K, T]."""
    n_pages = -(-n_tokens // limits.page_size)
    n_kv_heads = len(chosen_KC)
    first = max(limits.first_newest(n_tokens), min(limits.n_sinks, n_pages))
    ends = [np.arange(min(limits.n_sinks, n_pages)), np.arange(first, n_pages)]
    sinks_KT, newest_KT = (np.broadcast_to(pages, (n_kv_heads, len(pages))) for pages in ends)
    return np.concatenate([sinks_KT, chosen_KC, newest_KT], axis=1)
