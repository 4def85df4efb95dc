"""A decode step of all layers in one call of compiled code (numba): without Python between them, which takes as long as the
attention to a few hundred tokens, and lets the other threads fall asleep.
"""

import numpy as np

from trt_kv.plugins.attention_cpu import append_tokens
from trt_kv.plugins.decode_cpu import attend_one
from trt_kv.plugins.jit import njit
from trt_kv.plugins.packed_products import RoundedRows
from trt_kv.plugins.paging import Floats, Ints
from trt_kv.runtime.backends.host.attention_layers import AttentionLayers, CachedTokens
from trt_kv.runtime.backends.host.native.interpreter import run_segment

SegmentArguments = tuple[Ints, Floats, Ints, Ints, Ints, RoundedRows, Floats, Floats, Floats]
"""What ``run_segment`` takes between the number of rows and the ports."""


@njit()
def run_decode_step(
    ops: Ints,
    ends: Ints,
    n_logits: int,
    shape: tuple[int, int, int],
    layers: AttentionLayers,
    tokens: CachedTokens,
    segment_arguments: SegmentArguments,
) -> None:
    """Run all segments, with attention between them, on a step with one token per sequence.

    ``ops``: of all segments, which end at ``ends``. ``n_logits``: rows that need logits. ``shape``: query heads, KV heads, head
    size. ``layers`` are those of the cache, which may be parts of the model's (``trt_kv/cache_layers.py``).
    """
    n_rows, (n_heads, n_kv_heads, head_size) = len(tokens.positions_N), shape
    q_end, k_end = n_rows * n_heads * head_size, n_rows * (n_heads + n_kv_heads) * head_size
    ports = np.empty(n_rows * (n_heads + 2 * n_kv_heads) * head_size, np.float32)
    q_NHD = ports[:q_end].reshape((n_rows, n_heads, head_size))
    k_NKD = ports[q_end:k_end].reshape((n_rows, n_kv_heads, head_size))
    v_NKD = ports[k_end:].reshape((n_rows, n_kv_heads, head_size))
    attended_NHD = np.empty((n_rows, n_heads, head_size), np.float32)
    rows_N = np.arange(n_rows)
    begin, n_layers = 0, len(ends) - 1
    n_apart = len(layers.scale_L) // n_layers
    n_own, n_own_kv = n_heads // n_apart, n_kv_heads // n_apart
    apart = n_apart > 1
    own_q_NHD = np.empty((n_rows, n_own, head_size), np.float32) if apart else q_NHD
    own_k_NKD = np.empty((n_rows, n_own_kv, head_size), np.float32) if apart else k_NKD
    own_v_NKD = np.empty((n_rows, n_own_kv, head_size), np.float32) if apart else v_NKD
    own_attended_NHD = np.empty((n_rows, n_own, head_size), np.float32) if apart else attended_NHD
    lse_NH = np.empty((n_rows, n_own), np.float32)
    table_BKT = np.empty((n_rows, n_own_kv, tokens.page_table_LBT.shape[2]), np.int64)
    for layer in range(n_layers):
        run_segment(ops[begin : ends[layer]], n_rows, *segment_arguments, ports, attended_NHD)
        begin = ends[layer]
        for part in range(n_apart):
            at = layer * n_apart + part
            if apart:
                own_q_NHD[:] = q_NHD[:, part * n_own : (part + 1) * n_own]
                own_k_NKD[:] = k_NKD[:, part * n_own_kv : (part + 1) * n_own_kv]
                own_v_NKD[:] = v_NKD[:, part * n_own_kv : (part + 1) * n_own_kv]
            append_tokens(tokens.kv, tokens.token_positions, tokens.slots_LN[at], own_k_NKD, own_v_NKD, tokens.positions_N)
            for b in range(n_rows):
                for head in range(n_own_kv):
                    for t in range(table_BKT.shape[2]):
                        table_BKT[b, head, t] = tokens.page_table_LBT[at, b, t]
            attend_one(
                own_q_NHD,
                rows_N,
                table_BKT,
                tokens.kv_len_LB[at],
                tokens.kv,
                layers.scale_L[at],
                layers.soft_cap_L[at],
                layers.window_L[at],
                tokens.positions_N,
                tokens.token_positions,
                own_attended_NHD,
                lse_NH,
            )
            if apart:
                attended_NHD[:, part * n_own : (part + 1) * n_own] = own_attended_NHD
    run_segment(ops[begin : ends[n_layers]], n_logits, *segment_arguments, ports, attended_NHD)
