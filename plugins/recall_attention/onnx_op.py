"""RecallAttention in standard ONNX ops: all pages of the tables are bounded and ranked, and attention masks those not chosen.

The choice is one sort of T pages per KV head. TensorRT's TopK sorts at most 3840 elements, so there the body supports page
tables of up to 3840 pages.
"""

import math

import onnx_ir as ir

from trt_kv.plugins.onnx_attention import append_tokens, attention
from trt_kv.plugins.onnx_function import FunctionBody
from trt_kv.plugins.onnx_paging import FLOAT, HIDDEN, PagedSequences, paged_sequences, size, visible_slots, write_pages
from trt_kv.plugins.onnx_shares import kept_share_of
from trt_kv.plugins.recall_attention.page_counts import CODES

INT64 = ir.DataType.INT64


def body(
    f: FunctionBody,
    *,
    q: ir.Value,
    k: ir.Value,
    v: ir.Value,
    positions: ir.Value,
    cu_tokens: ir.Value,
    prompt_remaining: ir.Value,
    slots: ir.Value,
    page_table: ir.Value,
    kv_len: ir.Value,
    prompt_len: ir.Value,
    adaptive_budget: ir.Value,
    query_rows: ir.Value,
    kv: ir.Value,
    token_positions: ir.Value,
    summaries: ir.Value,
    last_query: ir.Value,
) -> tuple[ir.Value, ...]:
    """Spec: ``spec.py``. Returns out, lse, corrected, kv_out, token_positions_out, summaries_out, last_query_out.

    Sequences without a row in this step write nothing, and values read for them are not used.
    """
    kv_out, token_positions_out = append_tokens(f, kv, token_positions, slots=slots, k=k, v=v, positions=positions)
    cached = paged_sequences(f, page_table, kv_len, token_positions_out)
    first_B = f.Slice(cu_tokens, [0], [-1], [0])
    end_B = f.Slice(cu_tokens, [1], f.Shape(cu_tokens), [0])
    has_row_B = f.Less(first_B, end_B)
    last_B = f.Max(f.Sub(end_B, 1), 0)
    row_B = f.Where(has_row_B, f.Gather(query_rows, f.attribute("layer")), -1)
    q_BHD = f.Gather(q, last_B)
    generated_B = f.And(has_row_B, f.Less(f.Gather(prompt_remaining, last_B), 0))

    summaries_out = _summarized(f, summaries, kv_out, cached, f.Unsqueeze(f.Sub(end_B, first_B), [1]))
    before_BHD = f.Gather(last_query, f.Max(row_B, 0))
    corrected_BK, probe_BKGD = _probe(f, q_BHD, before_BHD, f.Unsqueeze(generated_B, [1]), size(f, kv, 2))
    room_B1 = _room(f, prompt_len, adaptive_budget, size(f, kv, 3))
    attended_BKT = _attended(f, cached, summaries_out, kv_out, probe_BKGD, room_B1)

    visible_K1NZ = visible_slots(f, cached, positions, cu_tokens)
    is_prompt_N1 = f.Unsqueeze(f.GreaterOrEqual(prompt_remaining, 0), [1])
    attended_K11Z = _by_slot(f, attended_BKT, size(f, kv, 3))
    out, lse = attention(f, q, kv_out, cached, f.And(visible_K1NZ, f.Or(is_prompt_N1, attended_K11Z)))
    last_query_out = write_pages(f, last_query, row_B, q_BHD)
    return out, lse, f.Cast(corrected_BK, to=INT64), kv_out, token_positions_out, summaries_out, last_query_out


def _summarized(f: FunctionBody, summaries: ir.Value, kv: ir.Value, cached: PagedSequences, n_new_B1: ir.Value) -> ir.Value:
    """The state with the summaries of the pages that this step has filled."""
    k_XKPD = f.Cast(f.Gather(f.Gather(kv, cached.pages), 0, axis=1), to=FLOAT)
    lo_XK1D, hi_XK1D = f.ReduceMin(k_XKPD, [2]), f.ReduceMax(k_XKPD, [2])
    middle_XK1D = f.Div(f.Add(lo_XK1D, hi_XK1D), 2.0)
    deviation_XK1D = f.ReduceMean(f.Abs(f.Sub(k_XKPD, middle_XK1D)), [2])
    by_deviation = f.Equal(f.attribute("summary"), 1)
    new_XK2D = f.Concat(
        f.Where(by_deviation, f.Sub(middle_XK1D, deviation_XK1D), lo_XK1D),
        f.Where(by_deviation, f.Add(middle_XK1D, deviation_XK1D), hi_XK1D),
        axis=2,
    )
    ends_T = f.Mul(f.Add(_pages(f, cached), 1), size(f, kv, 3))
    was_open_BT = f.Greater(ends_T, f.Sub(cached.n_cached, n_new_B1))
    filled_BT = f.And(f.LessOrEqual(ends_T, cached.n_cached), was_open_BT)
    table_X = f.Where(f.Reshape(filled_BT, [-1]), cached.table, -1)
    # Rows behind the bounds are for codes, which are made of the keys here: they get no content of their own.
    rows_S = f.Min(f.Range(0, size(f, summaries, 2), 1), 1)
    return write_pages(f, summaries, table_X, f.CastLike(f.Gather(new_XK2D, rows_S, axis=2), summaries))


def _probe(
    f: FunctionBody, q_BHD: ir.Value, before_BHD: ir.Value, generated_B1: ir.Value, n_kv_heads: ir.Value
) -> tuple[ir.Value, ir.Value]:
    """Whether a KV head is corrected, [B, K], and the queries that pages are ranked for, [B, K, G, D] fp32.

    A KV head is also corrected if one of its queries is zero or NaN. For sequences without a generated token, ``before`` is
    undefined and not used.
    """
    grouped = f.Concat([0], f.Unsqueeze(n_kv_heads, [0]), [-1], f.Shape(q_BHD, start=2), axis=0)
    q_BKGD, before_BKGD = (f.Reshape(f.Cast(x, to=FLOAT), grouped) for x in (q_BHD, before_BHD))
    squares = [f.ReduceSum(f.Mul(x, x), [3], keepdims=0) for x in (q_BKGD, before_BKGD)]
    norms_BKG = f.Mul(f.Sqrt(squares[0]), f.Sqrt(squares[1]))
    has_angle_BKG = f.Greater(norms_BKG, 0.0)
    dots_BKG = f.ReduceSum(f.Mul(q_BKGD, before_BKGD), [3], keepdims=0)
    cosines_BKG = f.Div(dots_BKG, f.Where(has_angle_BKG, norms_BKG, 1.0))
    close_BK = f.GreaterOrEqual(f.ReduceMean(cosines_BKG, [2], keepdims=0), f.attribute("tau"))
    has_angles_BK = f.Greater(f.ReduceMin(f.Cast(has_angle_BKG, to=FLOAT), [2], keepdims=0), 0.0)
    steady_BK = f.And(close_BK, has_angles_BK)
    probes_before_BK = f.And(steady_BK, generated_B1)
    probe_BKGD = f.Where(f.Unsqueeze(probes_before_BK, [2, 3]), before_BKGD, q_BKGD)
    return f.And(f.Not(steady_BK), generated_B1), probe_BKGD


def _room(f: FunctionBody, prompt_len: ir.Value, adaptive_budget: ir.Value, page_size: ir.Value) -> ir.Value:
    """Number of pages between sinks and newest that the budget has room for: [B, 1]."""
    found_B = f.Gather(adaptive_budget, f.attribute("layer"))
    told_B = f.Add(kept_share_of(f, prompt_len), f.attribute("kept_tokens"))
    pages_B = f.Div(f.Max(f.Where(f.Less(found_B, 0), told_B, found_B), 0), page_size)
    n_newest = f.Add(_pages_for(f, f.Sub(f.attribute("recent"), 1), page_size), 1)
    n_sinks = _pages_for(f, f.attribute("sinks"), page_size)
    return f.Unsqueeze(f.Sub(pages_B, f.Add(n_sinks, n_newest)), [1])


def _attended(
    f: FunctionBody,
    cached: PagedSequences,
    summaries: ir.Value,
    kv: ir.Value,
    probe_BKGD: ir.Value,
    room_B1: ir.Value,
) -> ir.Value:
    """[B, K, T]: mask of the pages that a generated token attends to; also set beyond the sequence's last page."""
    pages_T, page_size = _pages(f, cached), size(f, kv, 3)
    first_newest_B1 = f.Div(f.Max(f.Sub(cached.n_cached, f.attribute("recent")), 0), page_size)
    is_sink_T = f.Less(pages_T, _pages_for(f, f.attribute("sinks"), page_size))
    always_B1T = f.Unsqueeze(f.Or(is_sink_T, f.GreaterOrEqual(pages_T, first_newest_B1)), [1])
    between_B1T = f.Not(always_B1T)
    values_BKT = f.Where(between_B1T, _page_values(f, cached, summaries, kv, probe_BKGD, between_B1T), -math.inf)
    _, best_BKT = f.top_k(values_BKT, f.Shape(pages_T), largest=True)
    has_room_BKT = f.Expand(f.Unsqueeze(f.Cast(f.Less(pages_T, room_B1), to=INT64), [1]), f.Shape(best_BKT))
    chosen_BKT = f.Equal(f.ScatterElements(best_BKT, best_BKT, has_room_BKT, axis=2), 1)
    return f.Or(always_B1T, chosen_BKT)


def _page_values(
    f: FunctionBody,
    cached: PagedSequences,
    summaries: ir.Value,
    kv: ir.Value,
    probe_BKGD: ir.Value,
    between_B1T: ir.Value,
) -> ir.Value:
    """[B, K, T] fp32: the values that pages in between are ranked by; undefined for the others.

    max(x lo, x hi) is min(x, 0) lo + max(x, 0) hi, because lo <= hi: one matrix product.
    """
    summaries_BTKSD = f.Gather(summaries, cached.pages_by_sequence)
    summaries_BTK2D = f.Cast(f.Slice(summaries_BTKSD, [0], [2], [3]), to=FLOAT)
    lo_hi_BKTE = f.Reshape(f.Transpose(summaries_BTK2D, perm=[0, 2, 1, 3, 4]), [0, 0, 0, -1])
    lo_hi_BKTE = f.Where(f.Unsqueeze(between_B1T, [3]), lo_hi_BKTE, 0.0)
    probe_BKGE = f.Concat(f.Min(probe_BKGD, 0.0), f.Max(probe_BKGD, 0.0), axis=3)
    bounds_BKGT = f.MatMul(probe_BKGE, f.Transpose(lo_hi_BKTE, perm=[0, 1, 3, 2]))
    estimates_BKGT = _estimates(f, cached, summaries_BTK2D, kv, probe_BKGD)
    bounds_BKGT = f.Where(f.Equal(f.attribute("summary"), CODES), estimates_BKGT, bounds_BKGT)

    between_B11T = f.Unsqueeze(between_B1T, [2])
    logits_BKGT = f.Where(between_B11T, f.Mul(bounds_BKGT, f.attribute("softmax_scale")), HIDDEN)
    softmax_BKGT = f.Softmax(logits_BKGT, axis=3)
    pooling = f.attribute("pooling")
    pooled_BKGT = f.Where(f.Less(pooling, 2), softmax_BKGT, bounds_BKGT)
    means_BKT, largest_BKT = f.ReduceMean(pooled_BKGT, [2], keepdims=0), f.ReduceMax(pooled_BKGT, [2], keepdims=0)
    return f.Where(f.Equal(f.Mod(pooling, 2), 1), largest_BKT, means_BKT)


def _estimates(
    f: FunctionBody, cached: PagedSequences, summaries_BTK2D: ir.Value, kv: ir.Value, probe_BKGD: ir.Value
) -> ir.Value:
    """[B, K, G, T]: the largest product with a key of the page, as estimated from its codes.

    Codes are made of the keys themselves, which a graph has at hand.
    """
    k_BTKPD = f.Cast(f.Gather(f.Gather(kv, 0, axis=1), cached.pages_by_sequence), to=FLOAT)
    smallest_BTK1D, largest_BTK1D = f.ReduceMin(k_BTKPD, [3]), f.ReduceMax(k_BTKPD, [3])
    width_BTK1D = f.Sub(largest_BTK1D, smallest_BTK1D)
    width_BTK1D = f.Where(f.Greater(width_BTK1D, 0.0), width_BTK1D, 1.0)
    levels_BTKPD = f.Round(f.Div(f.Mul(f.Sub(k_BTKPD, smallest_BTK1D), 3.0), width_BTK1D))

    squares_BKD = f.ReduceSum(f.Mul(probe_BKGD, probe_BKGD), [2], keepdims=0)
    channels_D = f.Range(0, size(f, squares_BKD, 2), 1)
    n_coded = f.Div(f.Add(size(f, squares_BKD, 2), 3), 4)
    _, order_BKD = f.top_k(squares_BKD, f.Shape(channels_D), largest=True)
    is_first_BKD = f.Expand(f.Cast(f.Less(channels_D, n_coded), to=INT64), f.Shape(order_BKD))
    is_coded_BKD = f.Equal(f.ScatterElements(order_BKD, order_BKD, is_first_BKD, axis=2), 1)
    places_BTKPD = f.Where(f.Unsqueeze(is_coded_BKD, [1, 3]), f.Div(levels_BTKPD, 3.0), 0.5)

    lo_BTK1D, hi_BTK1D = (f.Unsqueeze(f.Gather(summaries_BTK2D, i, axis=3), [3]) for i in range(2))
    keys_BTKPD = f.Add(lo_BTK1D, f.Mul(places_BTKPD, f.Sub(hi_BTK1D, lo_BTK1D)))
    sizes = f.Shape(keys_BTKPD)
    keys_BKDZ = f.Reshape(f.Transpose(keys_BTKPD, perm=[0, 2, 4, 1, 3]), [0, 0, 0, -1])
    products_BKGZ = f.MatMul(probe_BKGD, keys_BKDZ)
    n_pages, page_size = f.Slice(sizes, [1], [2], [0]), f.Slice(sizes, [3], [4], [0])
    products_BKGTP = f.Reshape(products_BKGZ, f.Concat([0, 0, 0], n_pages, page_size, axis=0))
    return f.ReduceMax(products_BKGTP, [4], keepdims=0)


def _by_slot(f: FunctionBody, pages_BKT: ir.Value, page_size: ir.Value) -> ir.Value:
    """[K, 1, 1, Z]: each page's value for each of its slots."""
    repeated = f.Concat(f.Shape(pages_BKT), f.Unsqueeze(page_size, [0]), axis=0)
    slots_KBTP = f.Transpose(f.Expand(f.Unsqueeze(pages_BKT, [3]), repeated), perm=[1, 0, 2, 3])
    return f.Unsqueeze(f.Reshape(slots_KBTP, [0, -1]), [1, 2])


def _pages(f: FunctionBody, cached: PagedSequences) -> ir.Value:
    """[T]: 0 .. T - 1."""
    return f.Range(0, size(f, cached.pages_by_sequence, 1), 1)


def _pages_for(f: FunctionBody, n_tokens: ir.Value, page_size: ir.Value) -> ir.Value:
    """Scalar: tokens in pages, rounded up."""
    return f.Div(f.Add(n_tokens, f.Sub(page_size, 1)), page_size)
