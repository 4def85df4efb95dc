"""Triton kernels that rank pages: bounds from their summaries, and the best of them. Launched by ``choice_triton.py``.

H query heads, K KV heads, G = H / K, D head size.
"""

import triton
import triton.language as tl

from trt_kv.plugins.ranking_triton import extended, next_bytes, ordered_key


@triton.jit(
    do_not_specialize=["table_stride_b", "wanted_stride_b", "wanted_stride_k", "n_table", "sink_pages"],
    do_not_specialize_on_alignment=["table_ptr", "between_ptr", "wanted_ptr"],
)
def bound_kernel(
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
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """Several programs per (sequence, KV head), which stride over blocks of BLOCK_J pages between sinks and newest: summaries
    are read once for the query group.
    """
    b = tl.program_id(1)
    head = tl.program_id(2)
    first = tl.program_id(0) * BLOCK_J
    stride = tl.num_programs(0) * BLOCK_J
    tile = tl.arange(0, BLOCK_J)
    table_ptr += b * table_stride_b + sink_pages
    # Loaded before it is known whether there is anything to do, which saves one memory latency if there is.
    page = tl.load(table_ptr + first + tile, mask=sink_pages + first + tile < n_table, other=0)
    n = tl.load(between_ptr + b).to(tl.int32)
    wanted = tl.load(wanted_ptr + b * wanted_stride_b + head * wanted_stride_k).to(tl.int32)
    if (first >= n) | (wanted <= 0) | (wanted == n):
        return
    G: tl.constexpr = H // K
    d = tl.arange(0, BLOCK_D)
    query = b.to(tl.int64) * H + head * G
    queries: tl.tuple = ()
    for g in tl.static_range(G):
        queries = queries + (tl.load(probe_ptr + (query + g) * D + d, mask=d < D, other=0.0),)  # noqa: RUF005  (of Triton)
    for start in range(first, n, stride):
        j = start + tile
        at = (page * K + head)[:, None] * 2 * D + d[None, :]
        mask = (j < n)[:, None] & (d < D)[None, :]
        lo = tl.load(summaries_ptr + at, mask=mask, other=0.0).to(tl.float32)
        hi = tl.load(summaries_ptr + at + D, mask=mask, other=0.0).to(tl.float32)
        page = tl.load(table_ptr + j + stride, mask=sink_pages + j + stride < n_table, other=0)
        for g in tl.static_range(G):
            x = queries[g].to(tl.float32)[None, :]
            tl.store(bounds_ptr + (query + g) * n_table + j, tl.sum(tl.maximum(x * lo, x * hi), 1), mask=j < n)


@triton.jit
def choose_in_registers(
    bounds_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    n: tl.tensor,
    wanted: tl.tensor,
    softmax_scale: tl.tensor,
    n_table: tl.tensor,
    sink_pages: tl.tensor,
    G: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MAXIMUM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """The ``wanted`` best of at most BLOCK_J pages, in order: bounds are read once, and values stay in registers."""
    j = tl.arange(0, BLOCK_J)
    g = tl.arange(0, BLOCK_G)
    is_there = j < n
    mask = (g < G)[:, None] & is_there[None, :]
    values = tl.load(bounds_ptr + g[:, None] * n_table + j[None, :], mask=mask, other=float("-inf"))
    if SOFTMAX:
        largest = tl.max(values, 1)
        offset = tl.where(largest == float("-inf"), 0.0, largest)
        exps = tl.exp(softmax_scale * (values - offset[:, None]))
        total = tl.sum(tl.where(mask, exps, 0.0), 1)
        values = exps / total[:, None]
    keys = ordered_key(pooled_values(values, mask, MAXIMUM))
    least = tl.zeros([], tl.int64)
    for nth in tl.static_range(4):
        least, wanted, _ = extended(least, wanted, next_bytes(keys, is_there, least, nth))
    is_above = is_there & (keys > least)
    is_equal = is_there & (keys == least)
    # Numbers of larger and of equal keys up to each page, in one prefix sum: neither reaches 2**16.
    counts = tl.cumsum(is_above.to(tl.int32) * 65536 + is_equal.to(tl.int32))
    n_equal = counts & 65535
    to = (counts >> 16) + tl.minimum(n_equal, wanted) - 1
    tl.store(chosen_ptr + to, (sink_pages + j).to(tl.int64), mask=is_above | (is_equal & (n_equal <= wanted)))


@triton.jit
def pooled_values(values: tl.tensor, mask: tl.tensor, MAXIMUM: tl.constexpr) -> tl.tensor:
    """One value per page from those of a group's query heads, [BLOCK_G, BLOCK_J]: the maximum, or the sum for the mean."""
    if MAXIMUM:
        pooled = tl.max(tl.where(mask, values, float("-inf")), 0)
    else:
        pooled = tl.sum(tl.where(mask, values, 0.0), 0)
    return pooled


@triton.jit
def choose_by_tiles(
    bounds_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    n: tl.tensor,
    wanted: tl.tensor,
    softmax_scale: tl.tensor,
    n_table: tl.tensor,
    sink_pages: tl.tensor,
    G: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MAXIMUM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """``choose_in_registers`` for any number of pages, through memory."""
    tile = tl.arange(0, BLOCK_J)
    g = tl.arange(0, BLOCK_G)
    bounds_ptr += g[:, None] * n_table
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    if SOFTMAX:
        for start in range(0, n, BLOCK_J):
            mask = (g < G)[:, None] & (start + tile < n)[None, :]
            bounds = tl.load(bounds_ptr + start + tile[None, :], mask=mask, other=float("-inf"))
            larger = tl.maximum(largest, tl.max(bounds, 1))
            offset = tl.where(larger == float("-inf"), 0.0, larger)
            exps = tl.exp(softmax_scale * (bounds - offset[:, None]))
            total = total * tl.exp(softmax_scale * (largest - offset)) + tl.sum(tl.where(mask, exps, 0.0), 1)
            largest = larger
    for start in range(0, n, BLOCK_J):
        mask = (g < G)[:, None] & (start + tile < n)[None, :]
        values = tl.load(bounds_ptr + start + tile[None, :], mask=mask, other=0.0)
        if SOFTMAX:
            values = tl.exp(softmax_scale * (values - largest[:, None])) / total[:, None]
        tl.store(keys_ptr + start + tile, ordered_key(pooled_values(values, mask, MAXIMUM)), mask=start + tile < n)
    # Keys are read by other threads than those that wrote them.
    tl.debug_barrier()

    least = tl.zeros([], tl.int64)
    for nth in range(4):
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, n, BLOCK_J):
            keys = tl.load(keys_ptr + start + tile, mask=start + tile < n, other=0)
            histogram += next_bytes(keys, start + tile < n, least, nth)
        least, wanted, _ = extended(least, wanted, histogram)

    # All above the threshold, and the first ones that are equal to it.
    n_before = 0
    for start in range(0, n, BLOCK_J):
        keys = tl.load(keys_ptr + start + tile, mask=start + tile < n, other=-1)
        is_equal = (keys == least).to(tl.int32)
        is_in = ((keys > least) | ((is_equal == 1) & (tl.cumsum(is_equal) <= wanted))).to(tl.int32)
        to = n_before + tl.cumsum(is_in) - 1
        tl.store(chosen_ptr + to, (sink_pages + start + tile).to(tl.int64), mask=is_in == 1)
        n_before += tl.sum(is_in, 0)
        wanted -= tl.sum(is_equal, 0)


@triton.jit
def choose_for_head(
    bounds_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    row: tl.tensor,
    n: tl.tensor,
    wanted: tl.tensor,
    softmax_scale: tl.tensor,
    n_table: tl.tensor,
    sink_pages: tl.tensor,
    G: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MAXIMUM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    FEW: tl.constexpr,
    MANY: tl.constexpr,
) -> None:
    """The ``wanted`` best of ``n`` pages for row ``row`` (a KV head of a sequence). The algorithm depends on ``n`` alone, so
    that softmax sums in the same order whatever the width of the page table.
    """
    keys_ptr += row * n_table
    chosen_ptr += row * n_table
    bounds_ptr += row * G * n_table
    if wanted == n:
        for start in range(0, n, FEW):
            j = start + tl.arange(0, FEW)
            tl.store(chosen_ptr + j, (sink_pages + j).to(tl.int64), mask=j < n)
    elif wanted > 0:
        if n <= FEW:
            choose_in_registers(
                bounds_ptr, chosen_ptr, n, wanted, softmax_scale, n_table, sink_pages, G, SOFTMAX, MAXIMUM, BLOCK_G, FEW
            )
        elif n <= MANY:
            choose_in_registers(
                bounds_ptr, chosen_ptr, n, wanted, softmax_scale, n_table, sink_pages, G, SOFTMAX, MAXIMUM, BLOCK_G, MANY
            )
        else:
            choose_by_tiles(
                *(bounds_ptr, keys_ptr, chosen_ptr, n, wanted, softmax_scale, n_table, sink_pages),
                *(G, SOFTMAX, MAXIMUM, BLOCK_G, FEW),
            )


@triton.jit(
    do_not_specialize=["wanted_stride_b", "wanted_stride_k", "n_table", "sink_pages"],
    do_not_specialize_on_alignment=["between_ptr", "wanted_ptr"],
)
def choose_kernel(
    bounds_ptr: tl.tensor,
    between_ptr: tl.tensor,
    wanted_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    softmax_scale: tl.tensor,
    wanted_stride_b: tl.tensor,
    wanted_stride_k: tl.tensor,
    n_table: tl.tensor,
    sink_pages: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MAXIMUM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    FEW: tl.constexpr,
    MANY: tl.constexpr,
) -> None:
    """One program per (sequence, KV head): one value per page, the threshold of the chosen ones, the pages in order."""
    b = tl.program_id(0)
    head = tl.program_id(1)
    n = tl.load(between_ptr + b).to(tl.int32)
    wanted = tl.load(wanted_ptr + b * wanted_stride_b + head * wanted_stride_k).to(tl.int32)
    row = b.to(tl.int64) * K + head
    G: tl.constexpr = H // K
    choose_for_head(
        *(bounds_ptr, keys_ptr, chosen_ptr, row, n, wanted, softmax_scale, n_table, sink_pages),
        *(G, SOFTMAX, MAXIMUM, BLOCK_G, FEW, MANY),
    )
