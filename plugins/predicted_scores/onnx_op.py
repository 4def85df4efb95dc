"""PredictedScores in standard ONNX ops: a product of features and weights, one sort, one count."""

import onnx_ir as ir

from trt_kv.plugins.onnx_function import FunctionBody
from trt_kv.plugins.onnx_paging import (
    FLOAT,
    LAST_POSITION,
    PagedSequences,
    half_of_kv,
    paged_sequences,
    pages_of_slots,
    slots_of,
    write_pages,
)
from trt_kv.plugins.predicted_scores.spec import SMALLEST_NORM

INT64 = ir.DataType.INT64


def body(
    f: FunctionBody,
    *,
    evict: ir.Value,
    page_table: ir.Value,
    kv_len: ir.Value,
    kv: ir.Value,
    token_positions: ir.Value,
    scores: ir.Value,
) -> tuple[ir.Value, ...]:
    """Spec: ``spec.py``. Returns budget, scores_out."""
    cached = paged_sequences(f, page_table, kv_len, token_positions)
    evicts_B1 = f.Equal(f.Unsqueeze(evict, [1]), 1)
    scored_B1S = f.Unsqueeze(f.And(evicts_B1, cached.live), [1])
    before_BKS = slots_of(f, scores, cached.pages_by_sequence)
    scores_BKS = f.Where(scored_B1S, _predicted(f, cached, kv), before_BKS)
    budget_B1 = f.Where(evicts_B1, f.Min(_needed(f, cached, scores_BKS), cached.n_cached), cached.n_cached)
    return (
        f.Squeeze(budget_B1, [1]),
        write_pages(f, scores, cached.table, pages_of_slots(f, scores_BKS, scores)),
    )


def _predicted(f: FunctionBody, cached: PagedSequences, kv: ir.Value) -> ir.Value:
    """[B, K, S]: the scores of all slots; anything in slots that hold no token."""
    by_slot = f.Concat([0], f.Shape(cached.live), [-1], axis=0)
    k_KBSD, v_KBSD = (f.Reshape(half_of_kv(f, kv, cached.pages, half), by_slot) for half in (0, 1))
    frequencies_F = f.attribute("frequencies")
    positions_KBS1 = f.Unsqueeze(f.Transpose(f.Cast(cached.positions, to=FLOAT), perm=[1, 0, 2]), [3])
    angles_KBSF = f.Mul(positions_KBS1, frequencies_F)
    cos, sin = f.Cos(angles_KBSF), f.Sin(angles_KBSF)
    n_pairs, head_size = f.Shape(frequencies_F), f.Shape(k_KBSD, start=3)
    n_turned = f.Mul(n_pairs, 2)
    low, high = f.Slice(k_KBSD, [0], n_pairs, [3]), f.Slice(k_KBSD, n_pairs, n_turned, [3])
    still = f.Slice(k_KBSD, n_turned, head_size, [3])
    low_back, high_back = f.Add(f.Mul(low, cos), f.Mul(high, sin)), f.Sub(f.Mul(high, cos), f.Mul(low, sin))
    norms = [f.Log(f.Max(f.ReduceL2(x_KBSD, [3]), SMALLEST_NORM)) for x_KBSD in (k_KBSD, v_KBSD)]
    features_KBSF = f.Concat(low_back, high_back, still, v_KBSD, *norms, axis=3)
    weights_KF = f.Reshape(f.attribute("weights"), f.Concat(f.Shape(k_KBSD, end=1), [-1], axis=0))
    n_features = f.Shape(features_KBSF, start=3)
    linear_KF, constant_K1 = f.Slice(weights_KF, [0], n_features, [1]), f.Slice(weights_KF, n_features, [1 << 31], [1])
    scores_KBS = f.Squeeze(f.MatMul(features_KBSF, f.Unsqueeze(linear_KF, [1, 3])), [3])
    return f.Transpose(f.Add(scores_KBS, f.Unsqueeze(constant_K1, [2])), perm=[1, 0, 2])


def _needed(f: FunctionBody, cached: PagedSequences, scores_BKS: ir.Value) -> ir.Value:
    """[B, 1]: the largest number of tokens that a KV head needs; more than there are if that is fewer than the protected."""
    live_B1S = f.Unsqueeze(cached.live, [1])
    _, by_position_BKS = f.top_k(f.Where(live_B1S, cached.positions, LAST_POSITION), f.Shape(cached.slots), largest=False)
    in_order_BKS = f.GatherElements(scores_BKS, by_position_BKS, axis=2)
    sinks, recent, rank_S = f.attribute("sinks"), f.attribute("recent"), cached.slots
    others_B1S = f.Unsqueeze(f.And(f.GreaterOrEqual(rank_S, sinks), f.Less(rank_S, f.Sub(cached.n_cached, recent))), [1])
    above_BKS = f.And(others_B1S, f.Greater(in_order_BKS, f.attribute("threshold")))
    n_above_BK = f.ReduceSum(f.Cast(above_BKS, to=INT64), [2], keepdims=0)
    return f.Add(f.ReduceMax(n_above_BK, [1]), f.Add(sinks, recent))
