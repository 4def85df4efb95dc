"""CachedAttention on the CPU."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.attention_cpu import append_tokens, attend_cached
from trt_kv.plugins.cached_attention.arguments import Arguments
from trt_kv.plugins.decode_cpu import attend_one
from trt_kv.plugins.paging import Floats, pages_of


def run(args: Arguments[NDArray[Any]]) -> tuple[Floats, Floats]:
    """Spec: ``spec.py``. Returns (out [N, H, D], lse [N, H]); updates kv and token_positions in place."""
    append_tokens(args.kv, args.token_positions, args.slots[args.layer], args.k, args.v, args.positions)

    out = np.empty(args.q.shape, np.float32)
    lse = np.empty(args.q.shape[:2], np.float32)
    new_B = np.diff(args.cu_tokens)
    decoding = np.flatnonzero(new_B == 1)
    if len(decoding):
        table_BKT = np.repeat(args.page_table[args.layer, decoding, None], args.kv.shape[2], axis=1)
        attend_one(
            args.q,
            args.cu_tokens[decoding],
            table_BKT,
            args.kv_len[args.layer, decoding],
            args.kv,
            np.float32(args.scale),
            np.float32(args.soft_cap),
            args.window,
            args.positions,
            args.token_positions,
            out,
            lse,
        )
    for b in np.flatnonzero(new_B > 1):
        chunk = slice(args.cu_tokens[b], args.cu_tokens[b + 1])
        n_cached = int(args.kv_len[args.layer, b])
        pages = pages_of(args.page_table, args.layer, b, n_cached, args.page_size)
        out[chunk], lse[chunk] = attend_cached(
            args.q[chunk],
            args.positions[chunk],
            pages,
            n_cached,
            args.kv,
            args.token_positions,
            args.scale,
            window=args.window,
            soft_cap=args.soft_cap,
        )
    return out, lse
