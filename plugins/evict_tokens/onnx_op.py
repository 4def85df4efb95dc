"""EvictTokens in standard ONNX ops: three sorts, then one gather of rows.

TensorRT's TopK sorts at most 3840 elements, so that there the body serves page tables of up to 3840 slots. The plugin has no
such limit.
"""

import math

import onnx_ir as ir

from trt_kv.plugins.onnx_function import FunctionBody
from trt_kv.plugins.onnx_paging import PagedSequences, paged_sequences, size, slots_of, write_pages

INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL
SHARE_UNIT = 1 << 40
"""Shares in fixed point, for lack of fp64 in TensorRT: exact for shares of at least 2**-17 and up to 2**22 tokens."""

LAST_POSITION = (1 << 63) - 1


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
    scores_BS = slots_of(f, scores, cached.pages_by_sequence)
    evicts_B1 = f.Cast(f.Unsqueeze(evict, [1]), to=BOOL)
    target_B1 = _share_of(f, cached.n_cached) if budget is None else f.Unsqueeze(budget, [1])
    kept_B1, source_BS = _survivors(f, cached, scores_BS, target_B1)
    moves_BS = f.And(evicts_B1, f.Less(cached.slots, kept_B1))
    source_BS = f.Where(moves_BS, source_BS, cached.slots)

    kept = f.Squeeze(f.Where(evicts_B1, kept_B1, cached.n_cached), [1])
    kv_out = write_pages(f, kv, cached.table, _moved_rows(f, f.Gather(kv, cached.pages), source_BS))
    shape_XP = f.Concat([-1], f.Shape(token_positions, start=1), axis=0)
    positions_XP = f.Reshape(f.GatherElements(cached.positions, source_BS, axis=1), shape_XP)
    scores_XP = f.Reshape(f.GatherElements(scores_BS, source_BS, axis=1), shape_XP)
    return (
        kept,
        kv_out,
        write_pages(f, token_positions, cached.table, positions_XP),
        write_pages(f, scores, cached.table, scores_XP),
    )


def _share_of(f: FunctionBody, n_B1: ir.Value) -> ir.Value:
    """n - round((1 - kept_share) * n), halves to the even neighbour."""
    share = f.Cast(f.Mul(f.attribute("kept_share"), float(SHARE_UNIT)), to=INT64)
    forgotten = f.Mul(f.Sub(SHARE_UNIT, share), n_B1)
    whole, rest = f.Div(forgotten, SHARE_UNIT), f.Mod(forgotten, SHARE_UNIT)
    is_odd_half = f.And(f.Equal(rest, SHARE_UNIT // 2), f.Equal(f.Mod(whole, 2), 1))
    rounded = f.Add(whole, f.Cast(f.Or(f.Greater(rest, SHARE_UNIT // 2), is_odd_half), to=INT64))
    return f.Sub(n_B1, rounded)


def _survivors(f: FunctionBody, cached: PagedSequences, scores_BS: ir.Value, target_B1: ir.Value) -> tuple[ir.Value, ir.Value]:
    """How many tokens stay, [B, 1], and their slots in order of position, [B, S], anything behind the last of them."""
    n_B1, slots_S = cached.n_cached, cached.slots
    n_slots = f.Shape(slots_S)
    sinks, recent = f.attribute("sinks"), f.attribute("recent")
    kept_B1 = f.Min(f.Max(target_B1, f.Add(sinks, recent)), n_B1)

    _, by_position_BS = f.top_k(f.Where(cached.live, cached.positions, LAST_POSITION), n_slots, largest=False)
    rank_S = slots_S
    is_protected_BS = f.Or(f.Less(rank_S, sinks), f.GreaterOrEqual(rank_S, f.Sub(n_B1, recent)))
    value_BS = f.Where(is_protected_BS, math.inf, f.GatherElements(scores_BS, by_position_BS, axis=1))
    value_BS = f.Where(f.Less(rank_S, n_B1), value_BS, -math.inf)
    _, best_BS = f.top_k(value_BS, n_slots, largest=True)

    chosen_BS = f.Where(f.Less(rank_S, kept_B1), best_BS, size(f, slots_S, 0))
    chosen_BS, _ = f.top_k(chosen_BS, n_slots, largest=False)
    last_slot = f.Sub(n_slots, 1)
    return kept_B1, f.GatherElements(by_position_BS, f.Min(chosen_BS, last_slot), axis=1)


def _moved_rows(f: FunctionBody, pages: ir.Value, source_BS: ir.Value) -> ir.Value:
    """Pages [X, 2, K, P, D] in which slot s of sequence b holds what slot ``source_BS[b, s]`` of it held."""
    rows_XP2KD = f.Transpose(pages, perm=[0, 3, 1, 2, 4])
    rows_Z2KD = f.Reshape(rows_XP2KD, f.Concat([-1], f.Shape(rows_XP2KD, start=2), axis=0))
    sequence_B1 = f.Unsqueeze(f.Range(0, size(f, source_BS, 0), 1), [1])
    source_Z = f.Reshape(f.Add(f.Mul(sequence_B1, size(f, source_BS, 1)), source_BS), [-1])
    moved = f.Reshape(f.Gather(rows_Z2KD, source_Z), f.Shape(rows_XP2KD))
    return f.Transpose(moved, perm=[0, 2, 3, 1, 4])
