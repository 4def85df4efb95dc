"""Appending to paged KV state and attending to it in standard ONNX ops, for the bodies of ops that do both.

Holds the N x Z logits of all query heads in memory. Axes as in ``onnx_paging``.
"""

import onnx_ir as ir

from trt_kv.plugins.onnx_function import FunctionBody
from trt_kv.plugins.onnx_paging import (
    HIDDEN,
    PagedSequences,
    half_of_kv,
    query_key_logits,
    rows_of_slots,
    size,
    write_slots,
)


def append_tokens(
    f: FunctionBody,
    kv: ir.Value,
    token_positions: ir.Value,
    *,
    slots: ir.Value,
    k: ir.Value,
    v: ir.Value,
    positions: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """Both states with this step's tokens in their slots of the node's layer."""
    slots_N = f.Gather(slots, f.attribute("layer"))
    new_NRD = f.Concat(k, v, axis=1)  # a page is R = 2K blocks of P rows
    row_NR = rows_of_slots(f, slots_N, size(f, new_NRD, 1), size(f, kv, 3))
    rows = f.Reshape(kv, f.Concat([-1], f.Shape(kv, start=4), axis=0))
    kv_out = f.Reshape(f.ScatterND(rows, f.Unsqueeze(row_NR, [2]), new_NRD), f.Shape(kv))
    return kv_out, write_slots(f, token_positions, slots_N, positions)


def attention(
    f: FunctionBody, q: ir.Value, kv: ir.Value, cached: PagedSequences, visible_K1NZ: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """out [N, H, D] of the type of ``q``, and lse [N, H] fp32, over the visible slots."""
    k_KZD = half_of_kv(f, kv, cached.pages, 0)
    v_KZD = f.Where(f.Reshape(cached.live, [-1, 1]), half_of_kv(f, kv, cached.pages, 1), 0.0)
    logits = f.Where(visible_K1NZ, query_key_logits(f, q, k_KZD), HIDDEN)

    largest = f.ReduceMax(logits, [3])
    weights = f.Exp(f.Sub(logits, largest))
    total = f.ReduceSum(weights, [3])
    sums_KGND = f.MatMul(weights, f.Unsqueeze(v_KZD, [1]))
    out_NKGD = f.Transpose(f.Div(sums_KGND, total), perm=[2, 0, 1, 3])
    out = f.CastLike(f.Reshape(out_NKGD, f.Shape(q)), q)
    lse = f.Reshape(f.Transpose(f.Add(largest, f.Log(total)), perm=[2, 0, 1, 3]), [0, -1])
    return out, lse
