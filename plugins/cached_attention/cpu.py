"""CachedAttention on the CPU."""

import numpy as np

from trt_kv.plugins.attention_cpu import append_tokens, attend_cached, attend_one
from trt_kv.plugins.paging import Floats, Ints, pages_of


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
    append_tokens(kv, token_positions, slots[layer], k, v, positions)

    out = np.empty(q.shape, np.float32)
    lse = np.empty(q.shape[:2], np.float32)
    new_B = np.diff(cu_tokens)
    decoding = np.flatnonzero(new_B == 1)
    if len(decoding):
        table_BKT = np.repeat(page_table[layer, decoding, None], kv.shape[2], axis=1)
        attend_one(q, cu_tokens[decoding], table_BKT, kv_len[layer, decoding], kv, np.float32(scale), out, lse)
    for b in np.flatnonzero(new_B > 1):
        chunk = slice(cu_tokens[b], cu_tokens[b + 1])
        n_cached = int(kv_len[layer, b])
        pages = pages_of(page_table, layer, b, n_cached, page_size)
        out[chunk], lse[chunk] = attend_cached(q[chunk], positions[chunk], pages, n_cached, kv, token_positions, scale)
    return out, lse
