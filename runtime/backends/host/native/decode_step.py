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
    size.
    """
    n_rows, (n_heads, n_kv_heads, head_size) = len(tokens.positions_N), shape
    q_end, k_end = n_rows * n_heads * head_size, n_rows * (n_heads + n_kv_heads) * head_size
    ports = np.empty(n_rows * (n_heads + 2 * n_kv_heads) * head_size, np.float32)
    q_NHD = ports[:q_end].reshape((n_rows, n_heads, head_size))
    k_NKD = ports[q_end:k_end].reshape((n_rows, n_kv_heads, head_size))
    v_NKD = ports[k_end:].reshape((n_rows, n_kv_heads, head_size))
    attended_NHD = np.empty((n_rows, n_heads, head_size), np.float32)
    lse_NH = np.empty((n_rows, n_heads), np.float32)
    rows_N = np.arange(n_rows)
    table_BKT = np.empty((n_rows, n_kv_heads, tokens.page_table_LBT.shape[2]), np.int64)
    begin, n_layers = 0, len(layers.scale_L)
    for layer in range(n_layers):
        run_segment(ops[begin : ends[layer]], n_rows, *segment_arguments, ports, attended_NHD)
        begin = ends[layer]
        append_tokens(tokens.kv, tokens.token_positions, tokens.slots_LN[layer], k_NKD, v_NKD, tokens.positions_N)
        for b in range(n_rows):
            for head in range(n_kv_heads):
                for t in range(table_BKT.shape[2]):
                    table_BKT[b, head, t] = tokens.page_table_LBT[layer, b, t]
        attend_one(
            q_NHD,
            rows_N,
            table_BKT,
            tokens.kv_len_LB[layer],
            tokens.kv,
            layers.scale_L[layer],
            layers.soft_cap_L[layer],
            layers.window_L[layer],
            tokens.positions_N,
            tokens.token_positions,
            attended_NHD,
            lse_NH,
        )
    run_segment(ops[begin : ends[n_layers]], n_logits, *segment_arguments, ports, attended_NHD)
