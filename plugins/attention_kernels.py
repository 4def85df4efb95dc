"""Triton attention kernels, launched by ``attention_triton.py``.

H query heads, K KV heads, G = H / K, P page size, D head size. s is a slot index within a sequence. The keys of head h of page
p begin in row (2 K p + h) P of the pool, its values K P rows later.
"""

import triton
import triton.language as tl


@triton.jit
def capped(logits: tl.tensor, soft_cap: tl.tensor) -> tl.tensor:
    """c * tanh(x / c) of each logit in fp32, error about 2e-7 c. NaN stays NaN."""
    raised = tl.exp2(logits * (2.8853900817779268 / soft_cap))  # exp(2 x / c)
    return soft_cap - 2.0 * soft_cap / (raised + 1.0)


@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def append_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One program per token of the step."""
    i = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + i)
    page = slot // P
    offset = slot % P
    at = tl.arange(0, BLOCK)
    mask = at < K * D
    to = ((page * 2 * K + at // D) * P + offset) * D + at % D
    tl.store(kv_ptr + to, tl.load(k_ptr + i * K * D + at, mask=mask), mask=mask)
    tl.store(kv_ptr + to + K * P * D, tl.load(v_ptr + i * K * D + at, mask=mask), mask=mask)
    heads = tl.arange(0, BLOCK_K)
    positions = tl.load(positions_ptr + i) + tl.zeros([BLOCK_K], tl.int64)
    tl.store(token_positions_ptr + (page * K + heads) * P + offset, positions, mask=heads < K)


@triton.jit(
    do_not_specialize=["table_stride_b", "table_stride_k", "window"],
    do_not_specialize_on_alignment=["positions_ptr", "cu_ptr", "table_ptr", "len_ptr", "token_positions_ptr"],
)
def decode_kernel(
    q_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    table_stride_b: tl.tensor,
    table_stride_k: tl.tensor,
    window: tl.tensor,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    SPLITS: tl.constexpr,
    LOG2_E: tl.constexpr,
) -> None:
    """One program per (sequence, KV head, part of its tokens): page-heads are read once for the whole query group.

    With more than one part, out and lse are [B, H, SPLITS, D] and [B, H, SPLITS], for ``combine_kernel``; a part without tokens
    writes zeros and -inf.
    """
    b = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    G: tl.constexpr = H // K
    row = tl.load(cu_ptr + b)
    n = tl.load(len_ptr + b).to(tl.int32)
    if (tl.load(cu_ptr + b + 1) - row != 1) | (n == 0):
        return
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    in_group = (g < G)[:, None] & (d < D)[None, :]
    heads = head * G + g
    q = tl.load(q_ptr + (row * H + heads[:, None]) * D + d[None, :], mask=in_group, other=0.0)
    largest = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    sums = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    part = tl.cdiv(tl.cdiv(n, BLOCK_S), SPLITS) * BLOCK_S
    for start in range(split * part, min(split * part + part, n), BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = s < n
        page = tl.load(table_ptr + b * table_stride_b + head * table_stride_k + s // P, mask=inside, other=0)
        at = ((page * 2 * K + head) * P + s % P) * D
        k = tl.load(kv_ptr + at[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee")
        if CAPPED:
            logits = capped(logits * scale, soft_cap) * LOG2_E
        else:
            logits = logits * (scale * LOG2_E)
        if WINDOWED:
            slot = (page * K + head) * P + s % P
            position = tl.load(token_positions_ptr + slot, mask=inside, other=-1)
            inside = inside & (position > tl.load(positions_ptr + row) - window)
            logits = tl.where(inside[None, :], logits, float("-inf"))
        else:
            logits = tl.where(inside[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        offset = larger
        if WINDOWED:
            # As long as no token has been visible, -inf - -inf would be NaN.
            offset = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(logits - offset[:, None])
        before = tl.exp2(largest - offset)
        total = total * before + tl.sum(weights, 1)
        v = tl.load(kv_ptr + K * P * D + at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * before[:, None], input_precision="ieee")
        largest = larger
    sums = sums / tl.where(total > 0, total, 1.0)[:, None]
    if SPLITS == 1:
        to = row * H + heads
    else:
        to = (b.to(tl.int64) * H + heads) * SPLITS + split
    tl.store(out_ptr + to[:, None] * D + d[None, :], sums.to(out_ptr.dtype.element_ty), mask=in_group)
    tl.store(lse_ptr + to, (largest + tl.log2(total)) / LOG2_E, mask=g < G)


@triton.jit(do_not_specialize_on_alignment=["cu_ptr", "len_ptr"])
def combine_kernel(
    part_out_ptr: tl.tensor,
    part_lse_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    len_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """One program per (sequence, query head): the parts of ``decode_kernel``, each weighted by its softmax denominator."""
    b = tl.program_id(0)
    head = tl.program_id(1)
    row = tl.load(cu_ptr + b)
    if (tl.load(cu_ptr + b + 1) - row != 1) | (tl.load(len_ptr + b) == 0):
        return
    d = tl.arange(0, BLOCK_D)
    parts = (b.to(tl.int64) * H + head) * SPLITS + tl.arange(0, SPLITS)
    lse = tl.load(part_lse_ptr + parts)
    largest = tl.max(lse, 0)
    weights = tl.exp(lse - largest)
    total = tl.sum(weights, 0)
    out = tl.load(part_out_ptr + parts[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    out = tl.sum(out * weights[:, None], 0) / total
    tl.store(out_ptr + (row * H + head) * D + d, out.to(out_ptr.dtype.element_ty), mask=d < D)
    tl.store(lse_ptr + row * H + head, largest + tl.log(total))


@triton.jit
def sequence_of_tile(cu_ptr: tl.tensor, tile: tl.tensor, n_sequences: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """The sequence that tile number ``tile`` belongs to; the tiles of sequence b are numbered from cu[b] // ROWS + b on."""
    low = 0
    high = n_sequences
    while high - low > 1:
        middle = (low + high) // 2
        if tl.load(cu_ptr + middle) // ROWS + middle <= tile:
            low = middle
        else:
            high = middle
    return low


@triton.jit
def visible_ends(
    table_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    n: tl.tensor,
    oldest: tl.tensor,
    newest: tl.tensor,
    window: tl.tensor,
    head: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    WINDOWED: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Of a sequence's ``n`` slots: the number before the first one that is hidden from a query at position ``oldest`` as a
    later one, the first index and the end (last index + 1) of those visible to a query between ``oldest`` and ``newest``.
    """
    SCAN: tl.constexpr = 1024
    hidden = n
    first = 0
    if WINDOWED:
        first = n
    last = -1
    for start in range(0, n, SCAN):
        s = start + tl.arange(0, SCAN)
        page = tl.load(table_ptr + s // P, mask=s < n, other=0)
        position = tl.load(token_positions_ptr + (page * K + head) * P + s % P, mask=s < n, other=2**62)
        hidden = tl.minimum(hidden, tl.min(tl.where(position > oldest, s, n), 0))
        last = tl.maximum(last, tl.max(tl.where(position <= newest, s, -1), 0))
        if WINDOWED:
            first = tl.minimum(first, tl.min(tl.where(position > oldest - window, s, n), 0))
    return hidden, first, last + 1


@triton.jit(
    do_not_specialize=["table_stride_b", "n_sequences", "min_new", "window"],
    do_not_specialize_on_alignment=["positions_ptr", "cu_ptr", "table_ptr", "len_ptr"],
)
def chunk_kernel(
    q_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    table_stride_b: tl.tensor,
    n_sequences: tl.tensor,
    min_new: tl.tensor,
    window: tl.tensor,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LOG2_E: tl.constexpr,
) -> None:
    """One program per (BLOCK_M // G tokens of one sequence, KV head); a row of the tile is a token in one query head.

    Slots before the first one that is hidden from some row are read without masks: nearly all of them in a cache in order of
    position. With a window all slots are compared, from the first one that some row sees.
    """
    # The last tiles have the most work, so they start first.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    G: tl.constexpr = H // K
    ROWS: tl.constexpr = BLOCK_M // G
    b = sequence_of_tile(cu_ptr, tile, n_sequences, ROWS)
    begin = tl.load(cu_ptr + b)
    end = tl.load(cu_ptr + b + 1)
    first = begin + (tile - begin // ROWS - b) * ROWS
    n = tl.load(len_ptr + b).to(tl.int32)
    if (first >= end) | (end - begin < min_new) | (n == 0):
        return
    table_ptr += b * table_stride_b
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    is_d = d < D
    token = first + m // G
    is_row = (m // G < ROWS) & (token < end)
    at_row = token * H + head * G + m % G
    q_mask = is_row[:, None] & is_d[None, :]
    q = tl.load(q_ptr + at_row[:, None] * D + d[None, :], mask=q_mask, other=0.0)
    asked = tl.load(positions_ptr + token, mask=is_row, other=-1)
    oldest = tl.min(tl.where(is_row, asked, 2**62), 0)
    newest = tl.max(asked, 0)
    hidden, first_visible, n_visible = visible_ends(
        table_ptr, token_positions_ptr, n, oldest, newest, window, head, K, P, WINDOWED
    )
    n_whole = hidden // BLOCK_S * BLOCK_S
    compared = n_whole
    if WINDOWED:
        n_whole = 0
        compared = first_visible // BLOCK_S * BLOCK_S
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, n_whole, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at = ((tl.load(table_ptr + s // P) * 2 * K + head) * P + s % P) * D
        k = tl.load(kv_ptr + at[None, :] + d[:, None], mask=is_d[:, None], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee")
        if CAPPED:
            logits = capped(logits * scale, soft_cap) * LOG2_E
        else:
            logits = logits * (scale * LOG2_E)
        larger = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - larger[:, None])
        before = tl.exp2(largest - larger)
        total = total * before + tl.sum(weights, 1)
        v = tl.load(kv_ptr + K * P * D + at[:, None] + d[None, :], mask=is_d[None, :], other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * before[:, None], input_precision="ieee")
        largest = larger
    for start in range(compared, n_visible, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = s < n_visible
        page = tl.load(table_ptr + s // P, mask=inside, other=0)
        slot = page * K * P + head * P + s % P
        position = tl.load(token_positions_ptr + slot, mask=inside, other=2**62)
        at = (slot + page * K * P) * D
        k = tl.load(kv_ptr + at[None, :] + d[:, None], mask=inside[None, :] & is_d[:, None], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee")
        if CAPPED:
            logits = capped(logits * scale, soft_cap) * LOG2_E
        else:
            logits = logits * (scale * LOG2_E)
        visible = position[None, :] <= asked[:, None]
        if WINDOWED:
            visible = visible & (position[None, :] > asked[:, None] - window)
        logits = tl.where(visible, logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        # Until a row has seen a token, -inf - -inf would be NaN.
        offset = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(logits - offset[:, None])
        before = tl.exp2(largest - offset)
        total = total * before + tl.sum(weights, 1)
        v = tl.load(kv_ptr + K * P * D + at[:, None] + d[None, :], mask=inside[:, None] & is_d[None, :], other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * before[:, None], input_precision="ieee")
        largest = larger
    sums = sums / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + at_row[:, None] * D + d[None, :], sums.to(out_ptr.dtype.element_ty), mask=q_mask)
    tl.store(lse_ptr + at_row, (largest + tl.log2(total)) / LOG2_E, mask=is_row)
