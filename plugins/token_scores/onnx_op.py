"""TokenScores in standard ONNX ops. Holds the N x Z weights of all query heads in memory.

Pooling sorts a sequence's slots by position, which TensorRT's TopK supports for up to 3840 of them, as in EvictTokens.
"""

import onnx_ir as ir

from trt_kv.plugins.onnx_function import FunctionBody
from trt_kv.plugins.onnx_paging import (
    FLOAT,
    LAST_POSITION,
    PagedSequences,
    half_of_kv,
    paged_sequences,
    pages_of_slots,
    query_key_logits,
    rows_of_sequences,
    slots_of,
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
    counted_K1NZ = f.And(visible_slots(f, cached, positions, cu_tokens), _counted_rows(f, prompt_remaining))
    weights = f.Where(counted_K1NZ, f.Exp(f.Sub(logits, lse_KGN1)), 0.0)
    sums_KZ = f.ReduceMean(f.ReduceSum(weights, [2], keepdims=0), [1], keepdims=0)
    most_KZ = f.ReduceMax(weights, [1, 2], keepdims=0)
    is_per_head, is_maximum = f.Equal(f.attribute("per_head"), 1), f.Equal(f.attribute("maximum"), 1)
    sums_KZ = f.Where(is_per_head, sums_KZ, f.ReduceMean(sums_KZ, [0]))
    received_KZ = f.Where(is_maximum, f.Where(is_per_head, most_KZ, f.ReduceMax(most_KZ, [0])), sums_KZ)
    split = f.Concat([0], f.Shape(cached.live), axis=0)
    received_BKS = f.Transpose(f.Reshape(received_KZ, split), perm=[1, 0, 2])

    new_N = f.Expand(0.0, f.Shape(positions))
    started = write_slots(f, scores, f.Gather(slots, f.attribute("layer")), new_N)
    before_BKS = slots_of(f, started, cached.pages_by_sequence)
    last_B11 = _last_prompt_position(f, positions, cu_tokens, prompt_remaining)
    scores_BKS = f.Where(is_maximum, f.Max(before_BKS, received_BKS), f.Add(before_BKS, received_BKS))
    live_B1S = f.Unsqueeze(cached.live, [1])
    after_BKS = _finished(f, cached, scores_BKS, last_B11)
    after_BKS = _of_values(f, cached, after_BKS, last_B11, half_of_kv(f, kv, cached.pages, 1), split)
    after_BKS = f.Where(live_B1S, after_BKS, before_BKS)
    return (write_pages(f, started, cached.table, pages_of_slots(f, after_BKS, scores)),)


def _counted_rows(f: FunctionBody, prompt_remaining: ir.Value) -> ir.Value:
    """[N, 1]: whether a query adds to the scores: prompt tokens (only the last ``window`` if that is not 0), and generated
    tokens if ``generated`` is 1.
    """
    window = f.attribute("window")
    in_window = f.Or(f.Less(prompt_remaining, window), f.Equal(window, 0))
    of_prompt = f.And(f.GreaterOrEqual(prompt_remaining, 0), in_window)
    is_generated = f.And(f.Equal(prompt_remaining, -1), f.Equal(f.attribute("generated"), 1))
    return f.Unsqueeze(f.Or(of_prompt, is_generated), [1])


def _last_prompt_position(f: FunctionBody, positions: ir.Value, cu_tokens: ir.Value, prompt_remaining: ir.Value) -> ir.Value:
    """[B, 1, 1]: position of the last prompt token of a sequence if it is in this step; else -1."""
    is_last_NB = f.And(rows_of_sequences(f, positions, cu_tokens), f.Unsqueeze(f.Equal(prompt_remaining, 0), [1]))
    last_B = f.ReduceMax(f.Where(is_last_NB, f.Unsqueeze(positions, [1]), -1), [0], keepdims=0)
    return f.Unsqueeze(last_B, [1, 2])


def _finished(f: FunctionBody, cached: PagedSequences, scores_BKS: ir.Value, last_B11: ir.Value) -> ir.Value:
    """[B, K, S]: the scores, averaged and pooled in sequences whose prompt ends in this step."""
    window = f.attribute("window")
    n_queries = f.Sub(f.Add(last_B11, 1), cached.positions)
    n_queries = f.Max(f.Where(f.Equal(window, 0), n_queries, f.Min(n_queries, window)), 1)
    ends_B11 = f.GreaterOrEqual(last_B11, 0)
    averages = f.And(ends_B11, f.Equal(f.attribute("average"), 1))
    scores_BKS = f.Where(averages, f.Div(scores_BKS, f.Cast(n_queries, to=FLOAT)), scores_BKS)

    before_window = f.LessOrEqual(cached.positions, f.Sub(last_B11, window))
    pooled_BKS = f.And(f.And(before_window, f.Unsqueeze(cached.live, [1])), ends_B11)
    return f.Where(pooled_BKS, _neighbour_means(f, cached, scores_BKS, pooled_BKS), scores_BKS)


def _of_values(
    f: FunctionBody, cached: PagedSequences, scores_BKS: ir.Value, last_B11: ir.Value, v_KZD: ir.Value, split: ir.Value
) -> ir.Value:
    """[B, K, S]: with ``value_norm`` 1, in sequences whose prompt ends in this step, the scores, those before the window at
    least their mean, times the norms of the values.
    """
    before_BKS = f.And(f.LessOrEqual(cached.positions, f.Sub(last_B11, f.attribute("window"))), f.Unsqueeze(cached.live, [1]))
    n_BK1 = f.ReduceSum(f.Cast(before_BKS, to=FLOAT), [2])
    means_BK1 = f.Div(f.ReduceSum(f.Where(before_BKS, scores_BKS, 0.0), [2]), f.Max(n_BK1, 1.0))
    raised_BKS = f.Where(before_BKS, f.Max(scores_BKS, means_BK1), scores_BKS)
    squares_KZ = f.ReduceSum(f.Mul(v_KZD, v_KZD), [2], keepdims=0)
    squares_KZ = f.Where(f.Equal(f.attribute("per_head"), 1), squares_KZ, f.ReduceSum(squares_KZ, [0]))
    norms_BKS = f.Transpose(f.Reshape(f.Sqrt(squares_KZ), split), perm=[1, 0, 2])
    applies = f.And(f.GreaterOrEqual(last_B11, 0), f.Equal(f.attribute("value_norm"), 1))
    return f.Where(applies, f.Mul(raised_BKS, norms_BKS), scores_BKS)


def _neighbour_means(f: FunctionBody, cached: PagedSequences, scores_BKS: ir.Value, pooled_BKS: ir.Value) -> ir.Value:
    """[B, K, S]: for the slots of ``pooled_BKS`` the mean over ``pooling`` of them, next to each other in position."""
    pooling, slots_S = f.attribute("pooling"), cached.slots
    n_slots = f.Shape(slots_S)
    _, order_BKS = f.top_k(f.Where(pooled_BKS, cached.positions, LAST_POSITION), n_slots, largest=False)
    sorted_BKS = f.GatherElements(f.Where(pooled_BKS, scores_BKS, 0.0), order_BKS, axis=2)
    steps_J = f.Sub(f.Range(0, pooling, 1), f.Div(pooling, 2))
    neighbours_SJ = f.Add(f.Unsqueeze(slots_S, [1]), steps_J)
    exists_SJ = f.And(f.GreaterOrEqual(neighbours_SJ, 0), f.Less(neighbours_SJ, n_slots))
    values_BKSJ = f.Gather(sorted_BKS, f.Where(exists_SJ, neighbours_SJ, 0), axis=2)
    sums_BKS = f.ReduceSum(f.Where(exists_SJ, values_BKSJ, 0.0), [3], keepdims=0)
    means_BKS = f.Div(sums_BKS, f.Cast(pooling, to=FLOAT))
    return f.ScatterElements(means_BKS, order_BKS, means_BKS, axis=2)
