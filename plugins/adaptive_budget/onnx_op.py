"""AdaptiveBudget in standard ONNX ops: two sorts, one running sum, one count.

Whole page tables are sorted, because a token's rank follows neither from its slot nor from its position. TensorRT's TopK sorts
at most 3840 elements, so there the body, like that of EvictTokens, supports page tables of up to 3840 slots. The plugin has no
such limit.
"""

import math

import onnx_ir as ir

from trt_kv.plugins.adaptive_budget.spec import NO_WEIGHT
from trt_kv.plugins.onnx_function import FunctionBody
from trt_kv.plugins.onnx_paging import FLOAT, PagedSequences, capped, half_of_kv, paged_sequences, slots_of

INT64 = ir.DataType.INT64
LAST_POSITION = (1 << 63) - 1


def body(
    f: FunctionBody,
    *,
    q: ir.Value,
    lse: ir.Value,
    cu_tokens: ir.Value,
    evict: ir.Value,
    page_table: ir.Value,
    kv_len: ir.Value,
    kv: ir.Value,
    token_positions: ir.Value,
    scores: ir.Value | None = None,
) -> tuple[ir.Value, ...]:
    """Spec: ``spec.py``. Returns budget. Without scores, only ranking 1 with row 0 is valid."""
    cached = paged_sequences(f, page_table, kv_len, token_positions)
    first_B = f.Slice(cu_tokens, [0], [-1], [0])
    end_B = f.Slice(cu_tokens, [1], f.Shape(cu_tokens), [0])
    last_B = f.Max(f.Sub(end_B, 1), 0)
    row_BKGS = _attention_row(f, cached, f.Gather(q, last_B), f.Gather(lse, last_B), kv)
    has_row_B = f.Less(first_B, end_B)
    scores_BKS = None
    if scores is not None:
        scores_BKS = slots_of(f, scores, cached.pages_by_sequence)
        reads_scores = f.Equal(f.attribute("row"), 1)
        row_BKGS = f.Where(reads_scores, f.Abs(f.Unsqueeze(scores_BKS, [2])), row_BKGS)
        has_row_B = f.Or(reads_scores, has_row_B)

    order_BKGS = f.Expand(f.Unsqueeze(_kept_first(f, cached, scores_BKS), [2]), f.Shape(row_BKGS))
    n_needed_B1 = _needed(f, cached, f.GatherElements(row_BKGS, order_BKGS, axis=3))
    protected = f.Add(f.attribute("sinks"), f.attribute("recent"))
    budget_B = f.Squeeze(f.Min(f.Max(n_needed_B1, protected), cached.n_cached), [1])
    return (f.Where(f.And(f.Equal(evict, 1), has_row_B), budget_B, f.Squeeze(cached.n_cached, [1])),)


def _attention_row(f: FunctionBody, cached: PagedSequences, q_BHD: ir.Value, lse_BH: ir.Value, kv: ir.Value) -> ir.Value:
    """[B, K, G, S] fp32: weights of each sequence's query on its slots; anything in slots that hold no token of it."""
    k_KZD = half_of_kv(f, kv, cached.pages, 0)
    k_KBSD = f.Reshape(k_KZD, f.Concat([0], f.Shape(cached.live), [-1], axis=0))
    grouped = f.Concat([0], f.Shape(k_KZD, end=1), [-1], f.Shape(k_KZD, start=2), axis=0)
    q_BKGD = f.Reshape(f.Mul(f.Cast(q_BHD, to=FLOAT), f.attribute("scale")), grouped)
    logits_BKGS = capped(f, f.MatMul(q_BKGD, f.Transpose(k_KBSD, perm=[1, 0, 3, 2])))
    lse_BKG = f.Reshape(lse_BH, f.Shape(q_BKGD, end=3))
    return f.Exp(f.Sub(logits_BKGS, f.Unsqueeze(lse_BKG, [3])))


def _kept_first(f: FunctionBody, cached: PagedSequences, scores_BKS: ir.Value | None) -> ir.Value:
    """[B, K, S]: slots in the order in which they are kept: protected ones, candidates by ranking, then unused slots."""
    n_slots = f.Shape(cached.slots)
    n_B11 = f.Unsqueeze(cached.n_cached, [2])
    live_B1S = f.Unsqueeze(cached.live, [1])
    _, by_position_BKS = f.top_k(f.Where(live_B1S, cached.positions, LAST_POSITION), n_slots, largest=False)
    rank_S = cached.slots
    value_BKS = f.Expand(f.Cast(rank_S, to=FLOAT), f.Shape(by_position_BKS))
    if scores_BKS is not None:
        newest_first = f.Equal(f.attribute("ranking"), 1)
        value_BKS = f.Where(newest_first, value_BKS, f.GatherElements(scores_BKS, by_position_BKS, axis=2))
    is_recent_B1S = f.GreaterOrEqual(rank_S, f.Sub(n_B11, f.attribute("recent")))
    is_protected_B1S = f.Or(f.Less(rank_S, f.attribute("sinks")), is_recent_B1S)
    value_BKS = f.Where(is_protected_B1S, math.inf, value_BKS)
    value_BKS = f.Where(f.Less(rank_S, n_B11), value_BKS, -math.inf)
    _, best_BKS = f.top_k(value_BKS, n_slots, largest=True)
    return f.GatherElements(by_position_BKS, best_BKS, axis=2)


def _needed(f: FunctionBody, cached: PagedSequences, row_BKGS: ir.Value) -> ir.Value:
    """[B, 1]: the smallest m for which the first m slots, in the order in which they are kept, have the required norm.

    A row is divided by its largest weight before it is squared, because squares of small weights underflow in fp32.
    """
    rank_S = cached.slots
    protected = f.Add(f.attribute("sinks"), f.attribute("recent"))
    counts_S = f.Or(f.GreaterOrEqual(rank_S, protected), f.Equal(f.attribute("protected_in_norm"), 1))
    counts_B11S = f.And(f.Unsqueeze(f.Less(rank_S, cached.n_cached), [1, 2]), counts_S)
    weight_BKGS = f.Where(f.And(counts_B11S, f.GreaterOrEqual(row_BKGS, NO_WEIGHT)), row_BKGS, 0.0)
    largest_BKG1 = f.ReduceMax(weight_BKGS, [3])
    relative_BKGS = f.Div(weight_BKGS, f.Max(largest_BKG1, NO_WEIGHT))
    squares_BKGS = f.CumSum(f.Mul(relative_BKGS, relative_BKGS), 3)
    norm_BS = f.ReduceMean(f.Mul(largest_BKG1, f.Sqrt(squares_BKGS)), [1, 2], keepdims=0)

    needed_B1 = f.Mul(f.ReduceMax(norm_BS, [1]), f.Sub(1.0, f.attribute("threshold")))
    n_short_B1 = f.ReduceSum(f.Cast(f.Less(norm_BS, needed_B1), to=INT64), [1])
    return f.Add(n_short_B1, f.Cast(f.Greater(needed_B1, 0.0), to=INT64))
