"""CachedAttention in plain fp32 loops."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.cached_attention.arguments import Arguments
from trt_kv.plugins.kv_rows import dtype_of, store
from trt_kv.plugins.paging import Floats, capped, gather_kv, gather_slots, pages_of


def run(args: Arguments[NDArray[Any]]) -> tuple[Floats, Floats]:
    """Spec: ``spec.py``. Returns (out [N, H, D], lse [N, H]); updates kv and token_positions in place."""
    n_tokens, n_heads, _ = args.q.shape
    n_kv_heads = args.kv.shape[2]
    for i in range(n_tokens):
        page, offset = divmod(int(args.slots[args.layer, i]), args.page_size)
        args.kv[page, 0, :, offset] = store(args.k[i], dtype_of(args.kv))
        args.kv[page, 1, :, offset] = store(args.v[i], dtype_of(args.kv))
        args.token_positions[page, :, offset] = args.positions[i]

    out = np.empty_like(args.q)
    lse = np.empty((n_tokens, n_heads), np.float32)
    for b in range(len(args.cu_tokens) - 1):
        n_cached = int(args.kv_len[args.layer, b])
        pages = pages_of(args.page_table, args.layer, b, n_cached, args.page_size)
        k_KSD, v_KSD = gather_kv(args.kv, pages, n_cached)
        positions_KS = gather_slots(args.token_positions, pages, n_cached)
        for i in range(args.cu_tokens[b], args.cu_tokens[b + 1]):
            for h in range(n_heads):
                kv_head = h * n_kv_heads // n_heads
                visible = positions_KS[kv_head] <= args.positions[i]
                if args.window:
                    visible &= positions_KS[kv_head] > args.positions[i] - args.window
                products = k_KSD[kv_head, visible].astype(np.float32) * args.q[i, h].astype(np.float32)
                logits = capped(products.sum(axis=1) * np.float32(args.scale), args.soft_cap)
                largest = logits.max()
                weights = np.exp(logits - largest)
                lse[i, h] = largest + np.log(weights.sum())
                out[i, h] = (weights[:, None] * v_KSD[kv_head, visible].astype(np.float32)).sum(axis=0) / weights.sum()
    return out, lse
