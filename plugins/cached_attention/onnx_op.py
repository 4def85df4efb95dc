"""CachedAttention in standard ONNX ops. Holds the N x Z logits of all query heads in memory."""

import onnx_ir as ir

from trt_kv.plugins.onnx_function import FunctionBody
from trt_kv.plugins.onnx_paging import (
    HIDDEN,
    half_of_kv,
    paged_sequences,
    query_key_logits,
    rows_of_slots,
    size,
    visible_slots,
    write_slots,
)


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
    slots_N = f.Gather(slots, f.attribute("layer"))
    kv_out = _append(f, kv, slots_N, f.Concat(k, v, axis=1))
    token_positions_out = write_slots(f, token_positions, slots_N, positions)

    cached = paged_sequences(f, page_table, kv_len, token_positions_out)
    k_KZD = half_of_kv(f, kv_out, cached.pages, 0)
    v_KZD = f.Where(f.Reshape(cached.live, [-1, 1]), half_of_kv(f, kv_out, cached.pages, 1), 0.0)
    logits = f.Where(visible_slots(f, cached, positions, cu_tokens), query_key_logits(f, q, k_KZD), HIDDEN)

    largest = f.ReduceMax(logits, [3])
    weights = f.Exp(f.Sub(logits, largest))
    total = f.ReduceSum(weights, [3])
    sums_KGND = f.MatMul(weights, f.Unsqueeze(v_KZD, [1]))
    out_NKGD = f.Transpose(f.Div(sums_KGND, total), perm=[2, 0, 1, 3])
    out = f.CastLike(f.Reshape(out_NKGD, f.Shape(q)), q)
    lse = f.Reshape(f.Transpose(f.Add(largest, f.Log(total)), perm=[2, 0, 1, 3]), [0, -1])
    return out, lse, kv_out, token_positions_out


def _append(f: FunctionBody, kv: ir.Value, slots_N: ir.Value, new_NRD: ir.Value) -> ir.Value:
    """kv with the R = 2K rows of each new token in its slot; a page is R blocks of P rows."""
    row_NR = rows_of_slots(f, slots_N, size(f, new_NRD, 1), size(f, kv, 3))
    rows = f.Reshape(kv, f.Concat([-1], f.Shape(kv, start=4), axis=0))
    return f.Reshape(f.ScatterND(rows, f.Unsqueeze(row_NR, [2]), new_NRD), f.Shape(kv))
