"""CachedAttention in standard ONNX ops."""

import onnx_ir as ir

from trt_kv.plugins.onnx_attention import append_tokens, attention
from trt_kv.plugins.onnx_function import FunctionBody
from trt_kv.plugins.onnx_paging import paged_sequences, visible_slots, within_window


def body(
    f: FunctionBody,
    *,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    positions: ir.Value,
    cu_tokens: ir.Value,
    slots: ir.Value,
    page_table: ir.Value,
    kv_len: ir.Value,
    kv: ir.Value,
    token_positions: ir.Value,
) -> tuple[ir.Value, ...]:
    """Spec: ``spec.py``. Returns out, lse, kv_out, token_positions_out."""
    kv_out, token_positions_out = append_tokens(f, kv, token_positions, slots=slots, k=k, v=v, positions=positions)
    cached = paged_sequences(f, page_table, kv_len, token_positions_out)
    visible_K1NZ = f.And(visible_slots(f, cached, positions, cu_tokens), within_window(f, cached, positions))
    out, lse = attention(f, q, kv_out, cached, visible_K1NZ)
    return out, lse, kv_out, token_positions_out
