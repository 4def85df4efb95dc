"""Paged KV state in standard ONNX ops, for the bodies of the ops (``plugins/<op>/onnx_op.py``).

Every sequence is read through its whole page table, side by side with the others, so that no shape depends on data:
X = B * T pages of all tables, S = T * P slots of one table, Z = B * S slots of all tables. Entries of -1 read page 0 and are
masked; slots beyond a sequence's length have undefined content, which may be NaN.
"""

from dataclasses import dataclass

import onnx_ir as ir

from trt_kv.plugins.onnx_function import FunctionBody

FLOAT = ir.DataType.FLOAT
HIDDEN = -3.4e38
"""The logit of a token that a query may not see. Finite, so that a row without any visible token gives no NaN."""

LAST_POSITION = (1 << 63) - 1
"""Position given to slots that must sort after all others."""


@dataclass(frozen=True, kw_only=True)
class PagedSequences:
    """The cached tokens of all sequences in the node's layer."""

    table: ir.Value
    """[X]: the page tables as passed, -1 included."""
    pages: ir.Value
    """[X]: the same with page 0 for -1."""
    pages_by_sequence: ir.Value
    """[B, T]"""
    n_cached: ir.Value
    """[B, 1]"""
    slots: ir.Value
    """[S]: 0 .. S - 1."""
    positions: ir.Value
    """[B, K, S]"""
    live: ir.Value
    """[B, S]: whether the slot holds a token of the sequence."""


def paged_sequences(f: FunctionBody, page_table: ir.Value, kv_len: ir.Value, token_positions: ir.Value) -> PagedSequences:
    """Read the layer's rows of the step tensors and the positions in the sequences' slots."""
    layer = f.attribute("layer")
    table_BT = f.Gather(page_table, layer)
    pages_BT = f.Max(table_BT, 0)
    positions_BKS = slots_of(f, token_positions, pages_BT)
    n_cached_B1 = f.Unsqueeze(f.Gather(kv_len, layer), [1])
    slots_S = f.Range(0, size(f, positions_BKS, 2), 1)
    return PagedSequences(
        table=f.Reshape(table_BT, [-1]),
        pages=f.Reshape(pages_BT, [-1]),
        pages_by_sequence=pages_BT,
        n_cached=n_cached_B1,
        slots=slots_S,
        positions=positions_BKS,
        live=f.Less(slots_S, n_cached_B1),
    )


def size(f: FunctionBody, x: ir.Value, axis: int) -> ir.Value:
    """Scalar: the size of ``axis``."""
    return f.Squeeze(f.Shape(x, start=axis, end=axis + 1))


def slots_of(f: FunctionBody, pool_MKP: ir.Value, pages_BT: ir.Value) -> ir.Value:
    """[B, K, S]: the values of a per-slot pool in the pages."""
    return f.Reshape(f.Transpose(f.Gather(pool_MKP, pages_BT), perm=[0, 2, 1, 3]), [0, 0, -1])


def pages_of_slots(f: FunctionBody, values_BKS: ir.Value, pool_MKP: ir.Value) -> ir.Value:
    """[X, K, P]: the inverse of ``slots_of``, pages in the layout of a per-slot pool."""
    sizes = f.Shape(pool_MKP, start=1)
    values_BKTP = f.Reshape(values_BKS, f.Concat([0, 0, -1], f.Shape(pool_MKP, start=2), axis=0))
    return f.Reshape(f.Transpose(values_BKTP, perm=[0, 2, 1, 3]), f.Concat([-1], sizes, axis=0))


def half_of_kv(f: FunctionBody, kv: ir.Value, pages_X: ir.Value, half: int) -> ir.Value:
    """[K, Z, D] fp32: keys (half 0) or values (half 1) in the pages."""
    half_XKPD = f.Gather(f.Gather(kv, pages_X), half, axis=1)
    shape = f.Concat([0, -1], f.Shape(kv, start=4), axis=0)
    return f.Cast(f.Reshape(f.Transpose(half_XKPD, perm=[1, 0, 2, 3]), shape), to=FLOAT)


def query_key_logits(f: FunctionBody, q_NHD: ir.Value, k_KZD: ir.Value) -> ir.Value:
    """[K, G, N, Z] fp32: logits of every query head with every slot; G query heads share a KV head."""
    grouped = f.Concat([0], f.Shape(k_KZD, end=1), [-1], f.Shape(k_KZD, start=2), axis=0)
    q_NKGD = f.Reshape(f.Mul(f.Cast(q_NHD, to=FLOAT), f.attribute("scale")), grouped)
    q_KGND = f.Transpose(q_NKGD, perm=[1, 2, 0, 3])
    return capped(f, f.MatMul(q_KGND, f.Unsqueeze(f.Transpose(k_KZD, perm=[0, 2, 1]), [1])))


def capped(f: FunctionBody, logits: ir.Value) -> ir.Value:
    """c * tanh(x / c) of each logit, with the attribute ``soft_cap`` as c; the logits themselves if it is 0."""
    soft_cap = f.attribute("soft_cap")
    is_capped = f.Greater(soft_cap, 0.0)
    divisor = f.Where(is_capped, soft_cap, 1.0)
    return f.Where(is_capped, f.Mul(f.Tanh(f.Div(logits, divisor)), soft_cap), logits)


def within_window(f: FunctionBody, cached: PagedSequences, positions: ir.Value) -> ir.Value:
    """[K, 1, N, Z]: whether a slot's position is greater than the query's minus the attribute ``window``; all if it is 0."""
    window = f.attribute("window")
    positions_KZ = f.Reshape(f.Transpose(cached.positions, perm=[1, 0, 2]), [0, -1])
    first_N1 = f.Unsqueeze(f.Sub(positions, window), [1])
    inside_KNZ = f.Greater(f.Unsqueeze(positions_KZ, [1]), first_N1)
    return f.Unsqueeze(f.Or(inside_KNZ, f.Equal(window, 0)), [1])


def visible_slots(f: FunctionBody, cached: PagedSequences, positions: ir.Value, cu_tokens: ir.Value) -> ir.Value:
    """[K, 1, N, Z]: whether a query may see a slot: a token of its own sequence at a position not greater than its own.

    The axis of 1 is for the query heads of a group, as in ``query_key_logits``.
    """
    own_NB1 = f.Unsqueeze(rows_of_sequences(f, positions, cu_tokens), [2])
    positions_KBS = f.Transpose(cached.positions, perm=[1, 0, 2])
    past_KNBS = f.LessOrEqual(f.Unsqueeze(positions_KBS, [1]), f.Unsqueeze(positions, [1, 2]))
    return f.Unsqueeze(f.Reshape(f.And(f.And(own_NB1, cached.live), past_KNBS), [0, 0, -1]), [1])


def rows_of_sequences(f: FunctionBody, positions: ir.Value, cu_tokens: ir.Value) -> ir.Value:
    """[N, B]: whether a row of this step belongs to the sequence; rows of padding belong to none."""
    rows_N1 = f.Unsqueeze(f.Range(0, size(f, positions, 0), 1), [1])
    first_B = f.Slice(cu_tokens, [0], [-1], [0])
    end_B = f.Slice(cu_tokens, [1], f.Shape(cu_tokens), [0])
    return f.And(f.GreaterOrEqual(rows_N1, first_B), f.Less(rows_N1, end_B))


def write_slots(f: FunctionBody, pool_MKP: ir.Value, slots_N: ir.Value, values_N: ir.Value) -> ir.Value:
    """The per-slot pool with ``values_N`` in the slots, the same in all KV heads."""
    n_heads, page_size = size(f, pool_MKP, 1), size(f, pool_MKP, 2)
    rows_NK = rows_of_slots(f, slots_N, n_heads, page_size)
    values_NK = f.Expand(f.Unsqueeze(values_N, [1]), f.Shape(rows_NK))
    flat = f.ScatterND(f.Reshape(pool_MKP, [-1]), f.Unsqueeze(rows_NK, [2]), values_NK)
    return f.Reshape(flat, f.Shape(pool_MKP))


def rows_of_slots(f: FunctionBody, slots_N: ir.Value, n_blocks: ir.Value, page_size: ir.Value) -> ir.Value:
    """[N, R]: row indices of a token in a pool whose pages are R = ``n_blocks`` blocks of P rows."""
    page_N1 = f.Unsqueeze(f.Div(slots_N, page_size), [1])
    offset_N1 = f.Unsqueeze(f.Mod(slots_N, page_size), [1])
    block_NR = f.Add(f.Mul(page_N1, n_blocks), f.Range(0, n_blocks, 1))
    return f.Add(f.Mul(block_NR, page_size), offset_N1)


def write_pages(f: FunctionBody, pool_M: ir.Value, table_X: ir.Value, pages_X: ir.Value) -> ir.Value:
    """The pool, [M, ...], with the pages, [X, ...], at the table's entries; those for -1 go to spare pages that are cut off."""
    n_pages = f.Shape(pool_M, end=1)
    spare_X = f.Add(f.Range(0, size(f, table_X, 0), 1), n_pages)
    target_X = f.Where(f.Less(table_X, 0), spare_X, table_X)
    written = f.ScatterND(f.Concat(pool_M, pages_X, axis=0), f.Unsqueeze(target_X, [1]), pages_X)
    return f.Slice(written, [0], n_pages, [0])
