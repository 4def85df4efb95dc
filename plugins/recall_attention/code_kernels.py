"""Triton kernels for codes of keys (``key_codes.py`` has their layout): how they are written, and pages ranked by them.

H query heads, K KV heads, G = H / K, P page size, D head size, R rows of a summary.
"""

import triton
import triton.language as tl

from trt_kv.plugins.recall_attention import page_counts

CODED_TOKENS = tl.constexpr(page_counts.CODED_TOKENS)


@triton.jit
def write_codes(
    keys_ptr: tl.tensor,
    to_ptr: tl.tensor,
    lo: tl.tensor,
    hi: tl.tensor,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Write the codes of one KV head's keys [P, D] in a page, a row for eight tokens. ``lo``, ``hi``: the smallest and largest.

    Quotients are rounded as IEEE 754 says, and levels to even, so that codes are those of a CPU, bit for bit.
    """
    d = tl.arange(0, BLOCK_D)
    t = tl.arange(0, CODED_TOKENS)
    width = tl.where(hi > lo, hi - lo, 1.0)
    bytes_ptr = to_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    N_BYTES: tl.constexpr = to_ptr.dtype.element_ty.primitive_bitwidth // 8
    for first in range(0, P, CODED_TOKENS):
        p = tl.minimum(first + t, P - 1)
        k = tl.load(keys_ptr + p[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float32)
        thirds = tl.div_rn((k - lo[None, :]) * 3.0, width[None, :])
        is_odd = ((thirds > 0.5) & (thirds < 1.5)) | (thirds > 2.5)
        lower = tl.sum(is_odd.to(tl.int32) << t[:, None], 0)
        upper = tl.sum((thirds >= 1.5).to(tl.int32) << t[:, None], 0)
        tl.store(bytes_ptr + d, lower.to(tl.uint8), mask=d < D)
        tl.store(bytes_ptr + D + d, upper.to(tl.uint8), mask=d < D)
        for unused in tl.static_range(2, N_BYTES):
            tl.store(bytes_ptr + unused * D + d, tl.zeros([BLOCK_D], tl.uint8), mask=d < D)
        bytes_ptr += N_BYTES * D


@triton.jit(do_not_specialize=["table_stride_b"], do_not_specialize_on_alignment=["table_ptr", "len_ptr"])
def code_kernel(
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    coded_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """One program per (column of the page table, sequence, KV head): bounds [M, K, 2, D] as they are, and codes behind them."""
    j = tl.program_id(0)
    b = tl.program_id(1)
    head = tl.program_id(2)
    if j >= tl.load(len_ptr + b) // P:
        return
    page = tl.load(table_ptr + b * table_stride_b + j)
    d = tl.arange(0, BLOCK_D)
    to_ptr = coded_ptr + (page * K + head) * ROWS * D
    for row in tl.static_range(2):
        bounds = tl.load(bounds_ptr + ((page * K + head) * 2 + row) * D + d, mask=d < D)
        tl.store(to_ptr + row * D + d, bounds, mask=d < D)
    keys_ptr = kv_ptr + (page * 2 * K + head) * P * D
    lo, hi = smallest_and_largest(keys_ptr, P, D, BLOCK_D, BLOCK_P)
    write_codes(keys_ptr, to_ptr + 2 * D, lo, hi, P, D, BLOCK_D)


@triton.jit
def smallest_and_largest(
    keys_ptr: tl.tensor, P: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Per channel of one KV head's keys [P, D] in a page: [BLOCK_D] fp32 each."""
    d = tl.arange(0, BLOCK_D)
    lo = tl.full([BLOCK_D], float("inf"), tl.float32)
    hi = tl.full([BLOCK_D], float("-inf"), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & (d < D)[None, :]
        k = tl.load(keys_ptr + p[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        lo = tl.minimum(lo, tl.min(tl.where(mask, k, float("inf")), 0))
        hi = tl.maximum(hi, tl.max(tl.where(mask, k, float("-inf")), 0))
    return lo, hi


@triton.jit
def squares_of(probe_ptr: tl.tensor, channels: tl.tensor, G: tl.constexpr, D: tl.constexpr) -> tl.tensor:
    """Sums of squares in ``channels`` over the G queries at ``probe_ptr``; 0 behind the last channel."""
    squares = tl.zeros(channels.shape, tl.float32)
    for g in tl.static_range(G):
        x = tl.load(probe_ptr + g * D + channels, mask=channels < D, other=0.0).to(tl.float32)
        squares += x * x
    return squares


@triton.jit
def is_coded_channel(
    probe_ptr: tl.tensor, G: tl.constexpr, D: tl.constexpr, N_CODED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr
) -> tl.tensor:
    """[BLOCK_D]: whether a channel is one of the N_CODED with the largest sums of squares, lower ones first."""
    d = tl.arange(0, BLOCK_D)
    own = squares_of(probe_ptr, d, G, D)
    n_before = tl.zeros([BLOCK_D], tl.int32)
    for start in range(0, BLOCK_D, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        other = squares_of(probe_ptr, c, G, D)
        is_before = other[:, None] > own[None, :]
        is_before |= (other[:, None] == own[None, :]) & (c[:, None] < d[None, :])
        n_before += tl.sum(is_before.to(tl.int32), 0)
    return n_before < N_CODED


@triton.jit(
    do_not_specialize=["table_stride_b", "wanted_stride_b", "wanted_stride_k", "n_table", "sink_pages"],
    do_not_specialize_on_alignment=["table_ptr", "between_ptr", "wanted_ptr"],
)
def estimate_kernel(
    probe_ptr: tl.tensor,
    summaries_ptr: tl.tensor,
    table_ptr: tl.tensor,
    between_ptr: tl.tensor,
    wanted_ptr: tl.tensor,
    bounds_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    wanted_stride_b: tl.tensor,
    wanted_stride_k: tl.tensor,
    n_table: tl.tensor,
    sink_pages: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    N_CODED: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """As ``bound_kernel``, with the largest estimate of a page's keys in place of a bound, for QUERIES query heads of a KV head
    at a time. A row of a tile is a page's codes of eight tokens: BLOCK_J pages with BLOCK_E such rows each, which are taken in
    turns if a page has more.
    """
    G: tl.constexpr = H // K
    PARTS: tl.constexpr = (G + QUERIES - 1) // QUERIES
    b = tl.program_id(1)
    head = tl.program_id(2) // PARTS
    first = tl.program_id(0) * BLOCK_J
    n = tl.load(between_ptr + b).to(tl.int32)
    wanted = tl.load(wanted_ptr + b * wanted_stride_b + head * wanted_stride_k).to(tl.int32)
    if (first >= n) | (wanted <= 0) | (wanted == n):
        return
    N_BYTES: tl.constexpr = summaries_ptr.dtype.element_ty.primitive_bitwidth // 8
    d = tl.arange(0, BLOCK_D)
    query = b.to(tl.int64) * H + head * G
    is_coded = is_coded_channel(probe_ptr + query * D, G, D, N_CODED, BLOCK_D, 16)
    of_part = tl.program_id(2) % PARTS * QUERIES
    queries: tl.tuple = ()
    for i in tl.static_range(QUERIES):
        g = tl.minimum(of_part + i, G - 1)
        queries = queries + (tl.load(probe_ptr + (query + g) * D + d, mask=d < D, other=0.0),)  # noqa: RUF005  (of Triton)
    codes_ptr = summaries_ptr.to(tl.pointer_type(tl.uint8), bitcast=True)
    row = tl.arange(0, BLOCK_J * BLOCK_E)
    for start in range(first, n, tl.num_programs(0) * BLOCK_J):
        j = start + row // BLOCK_E
        page = tl.load(table_ptr + b * table_stride_b + sink_pages + j, mask=j < n, other=0)
        at = (page * K + head) * ROWS * D
        mask = (j < n)[:, None] & (d < D)[None, :]
        lo = tl.load(summaries_ptr + at[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
        hi = tl.load(summaries_ptr + at[:, None] + D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        width = hi - lo
        known = lo + tl.where(is_coded, 0.0, 0.5)[None, :] * width
        step = tl.where(is_coded[None, :], width / 3, 0.0)
        largest: tl.tuple = ()
        for _ in tl.static_range(QUERIES):
            largest = largest + (tl.full([BLOCK_J * BLOCK_E], float("-inf"), tl.float32),)  # noqa: RUF005
        for of_tokens in range(0, ROWS - 2, BLOCK_E):
            e = of_tokens + row % BLOCK_E
            is_there = mask & (e < ROWS - 2)[:, None]
            at_codes = ((at + (2 + e) * D) * N_BYTES)[:, None] + d[None, :]
            lower = tl.load(codes_ptr + at_codes, mask=is_there, other=0).to(tl.int32)
            upper = tl.load(codes_ptr + at_codes + D, mask=is_there, other=0).to(tl.int32)
            for t in range(CODED_TOKENS):
                keys = known + (((lower >> t) & 1) + ((upper >> t) & 1) * 2).to(tl.float32) * step
                larger: tl.tuple = ()
                for i in tl.static_range(QUERIES):
                    products = tl.sum(queries[i].to(tl.float32)[None, :] * keys, 1)
                    products = tl.where(e < ROWS - 2, products, float("-inf"))
                    larger = larger + (tl.maximum(largest[i], products),)  # noqa: RUF005
                largest = larger
        for i in tl.static_range(QUERIES):
            of_page = tl.max(tl.reshape(largest[i], [BLOCK_J, BLOCK_E]), 1)
            to = start + tl.arange(0, BLOCK_J)
            tl.store(bounds_ptr + (query + of_part + i) * n_table + to, of_page, mask=(to < n) & (of_part + i < G))
