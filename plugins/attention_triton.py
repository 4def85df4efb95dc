"""Attention on the GPU, shared by the ops that attend: appending, one query over pages where they lie, a chunk of queries.

What a step holds is known on the device only, so both attention kernels are launched, and each leaves the other's sequences
alone. Why, and how work is divided: docs/decisions/0019-triton-kernels.md.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trt_kv.plugins.triton_launch import launch, n_processors, power_of_2

_SPLIT_TOKENS = 256
"""A sequence is not divided into parts that are shorter than this where it is as long as its page table admits."""
_LOG2_E = 1.4426950408889634


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
    do_not_specialize=["table_stride_b", "table_stride_k"], do_not_specialize_on_alignment=["cu_ptr", "table_ptr", "len_ptr"]
)
def decode_kernel(
    q_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    out_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    scale: tl.tensor,
    table_stride_b: tl.tensor,
    table_stride_k: tl.tensor,
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

    With parts, out and lse are [B, H, SPLITS, D] and [B, H, SPLITS], for ``combine_kernel``; a part without tokens writes zeros
    and -inf.
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
        logits = tl.dot(q, k, input_precision="ieee") * (scale * LOG2_E)
        logits = tl.where(inside[None, :], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - larger[:, None])
        before = tl.exp2(largest - larger)
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
    """The sequence that tile number ``tile`` belongs to, sequence b having tiles cu[b] // ROWS + b and following."""
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
def visible_end(
    table_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    n: tl.tensor,
    newest: tl.tensor,
    head: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
) -> tl.tensor:
    """One more than the last of a sequence's ``n`` slots that a query at position ``newest`` may see."""
    SCAN: tl.constexpr = 256
    last = -1
    for start in range(0, n, SCAN):
        s = start + tl.arange(0, SCAN)
        page = tl.load(table_ptr + s // P, mask=s < n, other=0)
        position = tl.load(token_positions_ptr + (page * K + head) * P + s % P, mask=s < n, other=2**62)
        last = tl.maximum(last, tl.max(tl.where(position <= newest, s, -1), 0))
    return last + 1


@triton.jit(
    do_not_specialize=["table_stride_b", "n_sequences", "min_new"],
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
    table_stride_b: tl.tensor,
    n_sequences: tl.tensor,
    min_new: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LOG2_E: tl.constexpr,
) -> None:
    """One program per (BLOCK_M // G tokens of one sequence, KV head); a row of the tile is a token in one query head."""
    tile = tl.program_id(0)
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
    token = first + m // G
    is_row = (m // G < ROWS) & (token < end)
    at_row = token * H + head * G + m % G
    q_mask = is_row[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + at_row[:, None] * D + d[None, :], mask=q_mask, other=0.0)
    asked = tl.load(positions_ptr + token, mask=is_row, other=-1)
    n_visible = visible_end(table_ptr, token_positions_ptr, n, tl.max(asked, 0), head, K, P)
    largest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(0, n_visible, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        inside = s < n_visible
        page = tl.load(table_ptr + s // P, mask=inside, other=0)
        slot = page * K * P + head * P + s % P
        position = tl.load(token_positions_ptr + slot, mask=inside, other=2**62)
        at = (slot + page * K * P) * D
        k = tl.load(kv_ptr + at[None, :] + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0)
        logits = tl.dot(q, k, input_precision="ieee") * (scale * LOG2_E)
        logits = tl.where(position[None, :] <= asked[:, None], logits, float("-inf"))
        larger = tl.maximum(largest, tl.max(logits, 1))
        # Until a row has seen a token, -inf - -inf would be NaN.
        offset = tl.where(larger == float("-inf"), 0.0, larger)
        weights = tl.exp2(logits - offset[:, None])
        before = tl.exp2(largest - offset)
        total = total * before + tl.sum(weights, 1)
        v = tl.load(kv_ptr + K * P * D + at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        sums = tl.dot(weights.to(v.dtype), v, sums * before[:, None], input_precision="ieee")
        largest = larger
    sums = sums / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out_ptr + at_row[:, None] * D + d[None, :], sums.to(out_ptr.dtype.element_ty), mask=q_mask)
    tl.store(lse_ptr + at_row, (largest + tl.log2(total)) / LOG2_E, mask=is_row)


def append_tokens(
    kv: Tensor, token_positions: Tensor, slots_N: Tensor, k_NKD: Tensor, v_NKD: Tensor, positions_N: Tensor
) -> None:
    """Write this step's tokens to their slots, the same in all KV heads."""
    n_kv_heads, page_size, head_size = kv.shape[2:]
    launch(
        append_kernel,
        (len(k_NKD),),
        k_ptr=k_NKD.contiguous(),
        v_ptr=v_NKD.contiguous(),
        positions_ptr=positions_N,
        slots_ptr=slots_N,
        kv_ptr=kv,
        token_positions_ptr=token_positions,
        K=n_kv_heads,
        P=page_size,
        D=head_size,
        BLOCK=power_of_2(n_kv_heads * head_size),
        BLOCK_K=power_of_2(n_kv_heads),
    )


def attend_one(
    q_NHD: Tensor, cu_tokens: Tensor, table_BKT: Tensor, kv_len_B: Tensor, kv: Tensor, scale: float, out: Tensor, lse: Tensor
) -> None:
    """The query of each sequence that has one token in this step attends to the first ``kv_len_B[b]`` tokens of its pages,
    all of which it may see: rows of ``out`` [N, H, D] and ``lse`` [N, H]. A sequence of length 0 is left alone.

    ``table_BKT`` holds pages of each KV head (an expanded axis K is fine), -1 or anything beyond the last.
    """
    n_heads = q_NHD.shape[1]
    n_kv_heads, page_size, head_size = kv.shape[2:]
    n_sequences = len(kv_len_B)
    n_splits = _n_splits(n_sequences * n_kv_heads, table_BKT.shape[2] * page_size, n_processors(kv.device))
    parts, lse_parts = out, lse
    if n_splits > 1:
        parts = torch.empty((n_sequences, n_heads, n_splits, head_size), dtype=torch.float32, device=kv.device)
        lse_parts = torch.empty((n_sequences, n_heads, n_splits), dtype=torch.float32, device=kv.device)
    sizes = {"H": n_heads, "D": head_size, "BLOCK_D": max(16, power_of_2(head_size)), "SPLITS": n_splits}
    launch(
        decode_kernel,
        (n_sequences, n_kv_heads, n_splits),
        # A third stage fetches the page numbers of the tile after the next.
        stages=3 if kv.itemsize == 2 else 1,
        q_ptr=q_NHD,
        cu_ptr=cu_tokens,
        table_ptr=table_BKT,
        len_ptr=kv_len_B,
        kv_ptr=kv,
        out_ptr=parts,
        lse_ptr=lse_parts,
        scale=scale,
        table_stride_b=table_BKT.stride(0),
        table_stride_k=table_BKT.stride(1),
        K=n_kv_heads,
        P=page_size,
        BLOCK_G=max(16, power_of_2(n_heads // n_kv_heads)),
        BLOCK_S=64 if kv.itemsize == 2 else 32,
        LOG2_E=_LOG2_E,
        **sizes,
    )
    if n_splits > 1:
        launch(
            combine_kernel,
            (n_sequences, n_heads),
            part_out_ptr=parts,
            part_lse_ptr=lse_parts,
            cu_ptr=cu_tokens,
            len_ptr=kv_len_B,
            out_ptr=out,
            lse_ptr=lse,
            **sizes,
        )


def _n_splits(n_tasks: int, table_tokens: int, processors: int) -> int:
    """Into how many parts each sequence's tokens are divided: enough for two programs per processor, from shapes alone."""
    wanted = min(-(-2 * processors // max(1, n_tasks)), table_tokens // _SPLIT_TOKENS)
    return min(64, 1 << max(0, wanted.bit_length() - 1))


def attend_chunks(
    q_NHD: Tensor,
    positions_N: Tensor,
    cu_tokens: Tensor,
    table_BT: Tensor,
    kv_len_B: Tensor,
    kv: Tensor,
    token_positions: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    *,
    min_new: int,
) -> None:
    """Every query of a sequence that has at least ``min_new`` tokens in this step attends to those of the sequence's first
    ``kv_len_B[b]`` tokens that are not behind it: rows of ``out`` and ``lse``. A sequence of length 0 is left alone.
    """
    n_tokens, n_heads, _ = q_NHD.shape
    n_kv_heads, page_size, head_size = kv.shape[2:]
    group = n_heads // n_kv_heads
    block = max(64 if kv.itemsize == 2 else 16, power_of_2(group))
    launch(
        chunk_kernel,
        (n_tokens // (block // group) + len(kv_len_B), n_kv_heads),
        stages=2 if kv.itemsize == 2 else 1,
        q_ptr=q_NHD,
        positions_ptr=positions_N,
        cu_ptr=cu_tokens,
        table_ptr=table_BT,
        len_ptr=kv_len_B,
        kv_ptr=kv,
        token_positions_ptr=token_positions,
        out_ptr=out,
        lse_ptr=lse,
        scale=scale,
        table_stride_b=table_BT.stride(0),
        n_sequences=len(kv_len_B),
        min_new=min_new,
        H=n_heads,
        K=n_kv_heads,
        P=page_size,
        D=head_size,
        BLOCK_D=max(16, power_of_2(head_size)),
        BLOCK_M=block,
        BLOCK_S=64 if kv.itemsize == 2 else 32,
        LOG2_E=_LOG2_E,
    )
