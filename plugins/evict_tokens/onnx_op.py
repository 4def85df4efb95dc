"""EvictTokens in standard ONNX ops: four sorts, then one gather of rows.

TensorRT's TopK sorts at most 3840 elements, so there the body supports page tables of up to 3840 slots. The plugin has no such
limit.
"""

import math

import onnx_ir as ir

from trt_kv.plugins import lots
from trt_kv.plugins.onnx_function import FunctionBody
from trt_kv.plugins.onnx_paging import (
    FLOAT,
    LAST_POSITION,
    PagedSequences,
    paged_sequences,
    pages_of_slots,
    size,
    slots_of,
    write_pages,
)
from trt_kv.plugins.onnx_shares import SHARE_UNIT, fixed_point, kept_share_of

INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL


def body(
    f: FunctionBody,
    *,
    evict: ir.Value,
    page_table: ir.Value,
    kv_len: ir.Value,
    kv: ir.Value,
    token_positions: ir.Value,
    scores: ir.Value,
    budget: ir.Value | None = None,
) -> tuple[ir.Value, ...]:
    """Spec: ``spec.py``. Returns kept, kv_out, token_positions_out, scores_out."""
    cached = paged_sequences(f, page_table, kv_len, token_positions)
    scores_BKS = slots_of(f, scores, cached.pages_by_sequence)
    evicts_B1 = f.Cast(f.Unsqueeze(evict, [1]), to=BOOL)
    drops_B1 = f.Equal(f.Unsqueeze(evict, [1]), 2)
    kept_B1, recents_B1 = _counts(f, cached.n_cached, drops_B1, budget)
    source_BKS = _sources(f, cached, scores_BKS, kept_B1, recents_B1, drops_B1)
    moves_B1S = f.Unsqueeze(f.And(evicts_B1, f.Less(cached.slots, kept_B1)), [1])
    source_BKS = f.Where(moves_B1S, source_BKS, cached.slots)

    kept = f.Squeeze(f.Where(evicts_B1, kept_B1, cached.n_cached), [1])
    positions_XKP = pages_of_slots(f, f.GatherElements(cached.positions, source_BKS, axis=2), token_positions)
    scores_XKP = pages_of_slots(f, f.GatherElements(scores_BKS, source_BKS, axis=2), scores)
    return (
        kept,
        write_pages(f, kv, cached.table, _moved_rows(f, kv, cached, source_BKS)),
        write_pages(f, token_positions, cached.table, positions_XKP),
        write_pages(f, scores, cached.table, scores_XKP),
    )


def _counts(f: FunctionBody, n_B1: ir.Value, drops_B1: ir.Value, budget: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """The number of tokens to keep, and how many of them are kept for being the most recent: each [B, 1]."""
    drop, sinks = f.attribute("drop"), f.attribute("sinks")
    by_budget_B1 = f.Add(kept_share_of(f, n_B1), f.attribute("kept_tokens")) if budget is None else f.Unsqueeze(budget, [1])
    target_B1 = f.Where(drops_B1, f.Sub(n_B1, drop), by_budget_B1)
    target_B1 = f.Min(f.Max(target_B1, f.attribute("floor"), 1), n_B1)
    of_recent = f.Mul(fixed_point(f, "recent_share"), f.Max(f.Sub(target_B1, sinks), 0))
    recents_B1 = f.Max(f.Div(of_recent, SHARE_UNIT), f.attribute("recent"))
    return f.Min(f.Max(target_B1, f.Add(recents_B1, sinks)), n_B1), recents_B1


def _sources(
    f: FunctionBody,
    cached: PagedSequences,
    scores_BKS: ir.Value,
    kept_B1: ir.Value,
    recents_B1: ir.Value,
    drops_B1: ir.Value,
) -> ir.Value:
    """The source slot of each slot's token, [B, K, S]; arbitrary for slots that are empty afterwards."""
    rank_S, n_slots = cached.slots, f.Shape(cached.slots)
    live_B1S, n_B11, kept_B11 = f.Unsqueeze(cached.live, [1]), f.Unsqueeze(cached.n_cached, [2]), f.Unsqueeze(kept_B1, [2])
    positions_BKS, by_position_BKS = f.top_k(f.Where(live_B1S, cached.positions, LAST_POSITION), n_slots, largest=False)
    scores_BKS = f.GatherElements(scores_BKS, by_position_BKS, axis=2)
    worth_BKS = _worth(f, rank_S, positions_BKS, scores_BKS)
    is_recent_B1S = f.GreaterOrEqual(rank_S, f.Sub(n_B11, f.Unsqueeze(recents_B1, [2])))
    worth_BKS = f.Where(f.Or(f.Less(rank_S, f.attribute("sinks")), is_recent_B1S), math.inf, worth_BKS)
    worth_BKS = f.Where(f.Less(rank_S, n_B11), worth_BKS, -math.inf)
    _, best_BKS = f.top_k(worth_BKS, n_slots, largest=True)

    best_slot_BKS = f.GatherElements(by_position_BKS, best_BKS, axis=2)
    stays_BKS = f.Expand(f.Cast(f.Less(rank_S, kept_B11), to=INT64), f.Shape(best_slot_BKS))
    survives_BKS = f.Equal(f.ScatterElements(best_slot_BKS, best_slot_BKS, stays_BKS, axis=2), 1)
    return f.Where(
        f.Unsqueeze(drops_B1, [2]),
        _moved_into_free_slots(f, rank_S, survives_BKS, kept_B11),
        _compacted(f, rank_S, survives_BKS, by_position_BKS),
    )


def _worth(f: FunctionBody, rank_S: ir.Value, positions_BKS: ir.Value, scores_BKS: ir.Value) -> ir.Value:
    """[B, K, S] fp32: the values that tokens are ranked by, in order of position."""
    ranking = f.attribute("ranking")
    heads_K1 = f.Unsqueeze(f.Range(0, size(f, positions_BKS, 1), 1), [1])
    key = _scrambled(f, f.attribute("seed"), lots.ROUNDS[0])
    key = _scrambled(f, f.Add(key, f.attribute("layer")), lots.ROUNDS[1])
    lot_BKS = f.Add(f.Mod(positions_BKS, lots.PRIME), _scrambled(f, f.Add(key, heads_K1), lots.ROUNDS[2]))
    for constant in lots.ROUNDS[3:]:
        lot_BKS = _scrambled(f, lot_BKS, constant)
    lot_BKS = f.Cast(f.Mod(lot_BKS, lots.LOTS), to=FLOAT)
    return f.Where(f.Equal(ranking, 0), scores_BKS, f.Where(f.Equal(ranking, 1), f.Cast(rank_S, to=FLOAT), lot_BKS))


def _scrambled(f: FunctionBody, x: ir.Value, constant: int) -> ir.Value:
    """``lots.scrambled``."""
    base = f.Mod(f.Add(x, constant), lots.PRIME)
    square = f.Mod(f.Mul(base, base), lots.PRIME)
    return f.Mod(f.Mul(f.Mod(f.Mul(square, square), lots.PRIME), base), lots.PRIME)


def _compacted(f: FunctionBody, rank_S: ir.Value, survives_BKS: ir.Value, by_position_BKS: ir.Value) -> ir.Value:
    """[B, K, S]: the surviving slots in order of position, then the others."""
    stays_BKS = f.GatherElements(f.Cast(survives_BKS, to=INT64), by_position_BKS, axis=2)
    return f.GatherElements(by_position_BKS, _first_where(f, rank_S, f.Equal(stays_BKS, 1)), axis=2)


def _moved_into_free_slots(f: FunctionBody, slots_S: ir.Value, survives_BKS: ir.Value, kept_B11: ir.Value) -> ir.Value:
    """[B, K, S]: slots unchanged, except that freed ones take, in order, the kept tokens beyond the first ``kept`` slots."""
    in_front = f.Less(slots_S, kept_B11)
    is_free_BKS = f.And(in_front, f.Not(survives_BKS))
    free_BKS = _first_where(f, slots_S, is_free_BKS)
    behind_BKS = _first_where(f, slots_S, f.And(survives_BKS, f.Not(in_front)))
    n_free_BK1 = f.ReduceSum(f.Cast(is_free_BKS, to=INT64), [2])
    return f.ScatterElements(free_BKS, free_BKS, f.Where(f.Less(slots_S, n_free_BK1), behind_BKS, free_BKS), axis=2)


def _first_where(f: FunctionBody, slots_S: ir.Value, condition_BKS: ir.Value) -> ir.Value:
    """[B, K, S]: a permutation of the slots, those of the condition first, else in order."""
    n_slots = f.Shape(slots_S)
    _, order_BKS = f.top_k(f.Where(condition_BKS, slots_S, f.Add(slots_S, n_slots)), n_slots, largest=False)
    return order_BKS


def _moved_rows(f: FunctionBody, kv: ir.Value, cached: PagedSequences, source_BKS: ir.Value) -> ir.Value:
    """Pages [X, 2, K, P, D] in which slot s of sequence b and KV head k has the old content of slot ``source_BKS[b, k, s]``.

    A row of the pool is one slot of one KV head, K or V. Gathering rows of D numbers avoids repeating the indices D times.
    """
    page_size, n_heads = size(f, kv, 3), size(f, kv, 2)
    page_BKS = f.GatherElements(
        f.Expand(f.Unsqueeze(cached.pages_by_sequence, [1]), f.Concat([1], f.Shape(source_BKS, start=1, end=2), [1], axis=0)),
        f.Div(source_BKS, page_size),
        axis=2,
    )
    head_K1 = f.Unsqueeze(f.Range(0, n_heads, 1), [1])
    offset_BKS = f.Mod(source_BKS, page_size)
    halves = [
        f.Add(f.Mul(f.Add(f.Mul(f.Add(f.Mul(page_BKS, 2), half), n_heads), head_K1), page_size), offset_BKS) for half in (0, 1)
    ]
    rows_BK2S = f.Concat(*(f.Unsqueeze(rows, [2]) for rows in halves), axis=2)
    rows = f.Reshape(kv, f.Concat([-1], f.Shape(kv, start=4), axis=0))
    moved_BK2SD = f.Gather(rows, rows_BK2S)
    split = f.Concat([0, 0, 0, -1], f.Shape(kv, start=3), axis=0)
    moved_BT2KPD = f.Transpose(f.Reshape(moved_BK2SD, split), perm=[0, 3, 2, 1, 4, 5])
    return f.Reshape(moved_BT2KPD, f.Concat([-1], f.Shape(kv, start=1), axis=0))
