"""TokenScores in standard ONNX ops. Holds the N x Z weights of all query heads in memory."""

import onnx_ir as ir

from trt_kv.plugins.onnx_function import FunctionBody
from trt_kv.plugins.onnx_paging import (
    FLOAT,
    half_of_kv,
    paged_sequences,
    query_key_logits,
    size,
    visible_slots,
    write_pages,
    write_slots,
)


def body(
    f: FunctionBody,
    *,
    q: ir.Value,
    lse: ir.Value,
    positions: ir.Value,
    cu_tokens: ir.Value,
    prompt_remaining: ir.Value,
    slots: ir.Value,
    page_table: ir.Value,
    kv_len: ir.Value,
    kv: ir.Value,
    token_positions: ir.Value,
    scores: ir.Value,
) -> tuple[ir.Value, ...]:
    """Spec: ``spec.py``. Returns scores_out."""
    cached = paged_sequences(f, page_table, kv_len, token_positions)
    logits = query_key_logits(f, q, half_of_kv(f, kv, cached.pages, 0))
    grouped = f.Shape(logits, end=2)
    lse_KGN1 = f.Unsqueeze(f.Transpose(f.Reshape(lse, f.Concat([0], grouped, axis=0)), perm=[1, 2, 0]), [3])
    counted_NZ = f.And(visible_slots(f, cached, positions, cu_tokens), _counted_rows(f, prompt_remaining))
    weights = f.Where(counted_NZ, f.Exp(f.Sub(logits, lse_KGN1)), 0.0)
    received_Z = f.Div(f.ReduceSum(weights, [0, 1, 2], keepdims=0), f.Cast(size(f, q, 1), to=FLOAT))

    new_N = f.Expand(0.0, f.Shape(positions))
    started = write_slots(f, scores, f.Gather(slots, f.attribute("layer")), new_N)
    pages_XP = f.Gather(started, cached.pages)
    return (write_pages(f, started, cached.table, f.Add(pages_XP, f.Reshape(received_Z, f.Shape(pages_XP)))),)


def _counted_rows(f: FunctionBody, prompt_remaining: ir.Value) -> ir.Value:
    """[N, 1]: whether a query adds to the scores: a prompt token, and one of the last ``window`` where that is not 0."""
    window = f.attribute("window")
    in_window = f.Or(f.Less(prompt_remaining, window), f.Equal(window, 0))
    return f.Unsqueeze(f.And(f.GreaterOrEqual(prompt_remaining, 0), in_window), [1])
