"""TokenScores on the GPU: column sums of the attention matrix from the log-sum-exps, then averaging, pooling and norms.

Every program owns the slots of one tile, so no two programs add to the same score. How work is divided: decision 19.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trt_kv.plugins.attention_kernels import capped
from trt_kv.plugins.token_scores.arguments import Arguments
from trt_kv.plugins.triton_launch import launch, power_of_2

_LOG2_E = 1.4426950408889634
_BLOCK_S = 64
"""Slots per tile in kernels with little work per slot."""


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def zero_kernel(slots_ptr: tl.tensor, scores_ptr: tl.tensor, K: tl.constexpr, P: tl.constexpr, BLOCK_K: tl.constexpr) -> None:
    """One program per token of the step: its scores start at 0."""
    slot = tl.load(slots_ptr + tl.program_id(0))
    heads = tl.arange(0, BLOCK_K)
    tl.store(scores_ptr + (slot // P * K + heads) * P + slot % P, tl.zeros([BLOCK_K], tl.float32), mask=heads < K)


@triton.jit(
    do_not_specialize=["table_stride_b", "counted_from", "counted_to", "n_slots"],
    do_not_specialize_on_alignment=["positions_ptr", "cu_ptr", "remaining_ptr", "table_ptr", "len_ptr"],
)
def receive_kernel(
    q_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    positions_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    remaining_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    table_stride_b: tl.tensor,
    counted_from: tl.tensor,
    counted_to: tl.tensor,
    n_slots: tl.tensor,
    CAPPED: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LOG2_E: tl.constexpr,
    MAXIMUM: tl.constexpr,
) -> None:
    """One program per (BLOCK_S tokens of a sequence, sequence, KV head). If KV heads share their scores, each writes its own
    sums (maxima with MAXIMUM) to ``parts_ptr`` [B, K, slots of a page table], for ``share_kernel``.

    The roles of flash attention are exchanged: a tile of keys stays in registers, and the program loops over queries, from the
    first that counts and sees one of the keys. A query counts if ``counted_from`` to ``counted_to`` - 1 prompt tokens follow
    it. From the first row on whose queries all count and see the whole tile (nearly all rows of a prompt in order), no masks
    are needed.
    """
    b = tl.program_id(1)
    head = tl.program_id(2)
    first_slot = tl.program_id(0) * BLOCK_S
    n = tl.load(len_ptr + b).to(tl.int32)
    begin = tl.load(cu_ptr + b)
    n_new = (tl.load(cu_ptr + b + 1) - begin).to(tl.int32)
    if (first_slot >= n) | (n_new == 0):
        return
    G: tl.constexpr = H // K
    ROWS: tl.constexpr = BLOCK_M // G
    s = first_slot + tl.arange(0, BLOCK_S)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    is_d = d < D
    inside = s < n
    page = tl.load(table_ptr + b * table_stride_b + s // P, mask=inside, other=0)
    at_slot = (page * K + head) * P + s % P
    at_part = parts_ptr + (b * K + head) * n_slots + s
    position = tl.load(token_positions_ptr + at_slot, mask=inside, other=2**62)
    oldest = tl.min(position, 0)
    newest = tl.max(tl.where(inside, position, -1), 0)
    low = n_new
    high = 0
    whole = 0
    for start in range(0, n_new, 1024):
        row = start + tl.arange(0, 1024)
        asked = tl.load(positions_ptr + begin + row, mask=row < n_new, other=-1)
        remaining = tl.load(remaining_ptr + begin + row, mask=row < n_new, other=-2)
        is_counted = (remaining >= counted_from) & (remaining < counted_to)
        is_useful = is_counted & (asked >= oldest)
        low = tl.minimum(low, tl.min(tl.where(is_useful, row, n_new), 0))
        high = tl.maximum(high, tl.max(tl.where(is_useful, row + 1, 0), 0))
        is_whole = is_counted & (asked >= newest)
        whole = tl.maximum(whole, tl.max(tl.where(is_whole | (row >= n_new), 0, row + 1), 0))
    if high == 0:
        if not PER_HEAD:
            tl.store(at_part, tl.zeros([BLOCK_S], tl.float32), mask=inside)
        return
    # Rows low to compared - 1 are masked, the others up to high are not.
    compared = tl.minimum(low + tl.cdiv(tl.maximum(whole - low, 0), ROWS) * ROWS, high)
    k_at = kv_ptr + (at_slot + page * K * P) * D
    k = tl.load(k_at[:, None] + d[None, :], mask=inside[:, None] & is_d[None, :], other=0.0)
    received = tl.zeros([BLOCK_S, BLOCK_M], tl.float32)
    for start in range(low, compared, ROWS):
        row = start + m // G
        is_row = (m // G < ROWS) & (row < high)
        token = begin + row
        asked = tl.load(positions_ptr + token, mask=is_row, other=-1)
        remaining = tl.load(remaining_ptr + token, mask=is_row, other=-2)
        is_counted = (remaining >= counted_from) & (remaining < counted_to)
        at_row = token * H + head * G + m % G
        q = tl.load(q_ptr + at_row[None, :] * D + d[:, None], mask=is_counted[None, :] & is_d[:, None], other=0.0)
        lse = tl.load(lse_ptr + at_row, mask=is_counted, other=float("inf")) * LOG2_E
        logits = tl.dot(k, q, input_precision="ieee")
        if CAPPED:
            logits = capped(logits * scale, soft_cap) * LOG2_E
        else:
            logits = logits * (scale * LOG2_E)
        weights = tl.where(position[:, None] <= asked[None, :], tl.exp2(logits - lse[None, :]), 0.0)
        received = tl.maximum(received, weights) if MAXIMUM else received + weights
    for start in range(compared, high, ROWS):
        row = start + m // G
        is_row = (m // G < ROWS) & (row < high)
        at_row = (begin + row) * H + head * G + m % G
        q = tl.load(q_ptr + at_row[None, :] * D + d[:, None], mask=is_row[None, :] & is_d[:, None], other=0.0)
        lse = tl.load(lse_ptr + at_row, mask=is_row, other=float("inf")) * LOG2_E
        logits = tl.dot(k, q, input_precision="ieee")
        if CAPPED:
            logits = capped(logits * scale, soft_cap) * LOG2_E
        else:
            logits = logits * (scale * LOG2_E)
        weights = tl.exp2(logits - lse[None, :])
        received = tl.maximum(received, weights) if MAXIMUM else received + weights
    new = tl.max(received, 1) if MAXIMUM else tl.sum(received, 1) / G
    if PER_HEAD:
        before = tl.load(scores_ptr + at_slot, mask=inside, other=0.0)
        tl.store(scores_ptr + at_slot, tl.maximum(before, new) if MAXIMUM else before + new, mask=inside)
    else:
        tl.store(at_part, new, mask=inside)


@triton.jit(do_not_specialize=["table_stride_b", "n_slots"], do_not_specialize_on_alignment=["cu_ptr", "table_ptr", "len_ptr"])
def share_kernel(
    cu_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    n_slots: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    MAXIMUM: tl.constexpr,
) -> None:
    """One program per (BLOCK_S tokens of a sequence, sequence): every KV head gets the mean over the parts of all KV heads, or
    their maximum.
    """
    b = tl.program_id(1)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    n = tl.load(len_ptr + b).to(tl.int32)
    if (tl.program_id(0) * BLOCK_S >= n) | (tl.load(cu_ptr + b + 1) == tl.load(cu_ptr + b)):
        return
    inside = s < n
    total = tl.zeros([BLOCK_S], tl.float32)
    for head in range(K):
        part = tl.load(parts_ptr + (b * K + head) * n_slots + s, mask=inside, other=0.0)
        total = tl.maximum(total, part) if MAXIMUM else total + part
    page = tl.load(table_ptr + b * table_stride_b + s // P, mask=inside, other=0)
    for head in range(K):
        to = scores_ptr + (page * K + head) * P + s % P
        before = tl.load(to, mask=inside, other=0.0)
        tl.store(to, tl.maximum(before, total) if MAXIMUM else before + total / K, mask=inside)


@triton.jit
def last_position(
    positions_ptr: tl.tensor, remaining_ptr: tl.tensor, begin: tl.tensor, n_new: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The position of the sequence's last prompt token if it is in this step, else -1."""
    last = tl.full([], -1, tl.int64)
    for start in range(0, n_new, BLOCK):
        row = start + tl.arange(0, BLOCK)
        position = tl.load(positions_ptr + begin + row, mask=row < n_new, other=-1)
        remaining = tl.load(remaining_ptr + begin + row, mask=row < n_new, other=-2)
        last = tl.maximum(last, tl.max(tl.where(remaining == 0, position, -1), 0))
    return last


@triton.jit(
    do_not_specialize=["table_stride_b", "window"],
    do_not_specialize_on_alignment=["positions_ptr", "cu_ptr", "remaining_ptr", "table_ptr", "len_ptr"],
)
def finish_kernel(
    positions_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    remaining_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    sorted_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    window: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    AVERAGE: tl.constexpr,
    SORT: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """One program per (BLOCK_S tokens of a sequence, sequence, KV head), if the prompt ends in this step: divides scores by
    the number of their queries, and writes those to be pooled to ``sorted_ptr`` in order of position, 0 for the others.

    ``sorted_ptr`` is a pool like ``scores_ptr``: the score of rank r is at slot r of the sequence, and ``ranks_ptr`` holds each
    slot's rank, the number of smaller positions. Tiles whose positions are all smaller or all larger, which is nearly all of
    them in a prompt whose tokens are in order, need no comparison per token.
    """
    b = tl.program_id(1)
    head = tl.program_id(2)
    first_slot = tl.program_id(0) * BLOCK_S
    n = tl.load(len_ptr + b).to(tl.int32)
    begin = tl.load(cu_ptr + b)
    n_new = (tl.load(cu_ptr + b + 1) - begin).to(tl.int32)
    if (first_slot >= n) | (n_new == 0):
        return
    last = last_position(positions_ptr, remaining_ptr, begin, n_new, 256)
    if last < 0:
        return
    table_ptr += b * table_stride_b
    s = first_slot + tl.arange(0, BLOCK_S)
    inside = s < n
    at = (tl.load(table_ptr + s // P, mask=inside, other=0) * K + head) * P + s % P
    position = tl.load(token_positions_ptr + at, mask=inside, other=2**62)
    score = tl.load(scores_ptr + at, mask=inside, other=0.0)
    if AVERAGE:
        n_queries = last - position + 1
        n_queries = tl.where(window > 0, tl.minimum(n_queries, window), n_queries)
        score = score / tl.maximum(n_queries, 1).to(tl.float32)
        tl.store(scores_ptr + at, score, mask=inside)
    if SORT:
        oldest = tl.min(position, 0)
        newest = tl.max(tl.where(inside, position, -1), 0)
        rank = tl.zeros([BLOCK_S], tl.int32)
        for start in range(0, n, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            pages = tl.load(table_ptr + r // P, mask=r < n, other=0)
            others = tl.load(token_positions_ptr + (pages * K + head) * P + r % P, mask=r < n, other=2**62)
            if (tl.min(others, 0) < newest) & (tl.max(others, 0) > oldest):
                rank += tl.sum((others[None, :] < position[:, None]).to(tl.int32), 1)
            else:
                rank += tl.sum((others < oldest).to(tl.int32), 0)
        to = (tl.load(table_ptr + rank // P, mask=inside, other=0) * K + head) * P + rank % P
        tl.store(sorted_ptr + to, tl.where(position <= last - window, score, 0.0), mask=inside)
        tl.store(ranks_ptr + at, rank, mask=inside)


@triton.jit(
    do_not_specialize=["table_stride_b", "window"],
    do_not_specialize_on_alignment=["positions_ptr", "cu_ptr", "remaining_ptr", "table_ptr", "len_ptr"],
)
def pool_kernel(
    positions_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    remaining_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    sorted_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    window: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    POOLING: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """After ``finish_kernel``, with the same grid: means over neighbours in order of position."""
    b = tl.program_id(1)
    head = tl.program_id(2)
    first_slot = tl.program_id(0) * BLOCK_S
    n = tl.load(len_ptr + b).to(tl.int32)
    begin = tl.load(cu_ptr + b)
    n_new = (tl.load(cu_ptr + b + 1) - begin).to(tl.int32)
    if (first_slot >= n) | (n_new == 0):
        return
    last = last_position(positions_ptr, remaining_ptr, begin, n_new, 256)
    if last < 0:
        return
    table_ptr += b * table_stride_b
    s = first_slot + tl.arange(0, BLOCK_S)
    at = (tl.load(table_ptr + s // P, mask=s < n, other=0) * K + head) * P + s % P
    is_pooled = (s < n) & (tl.load(token_positions_ptr + at, mask=s < n, other=2**62) <= last - window)
    rank = tl.load(ranks_ptr + at, mask=is_pooled, other=0)
    total = tl.zeros([BLOCK_S], tl.float32)
    for nth in range(POOLING):
        neighbour = rank + nth - POOLING // 2
        is_there = is_pooled & (neighbour >= 0) & (neighbour < n)
        page = tl.load(table_ptr + neighbour // P, mask=is_there, other=0)
        total += tl.load(sorted_ptr + (page * K + head) * P + neighbour % P, mask=is_there, other=0.0)
    tl.store(scores_ptr + at, total / POOLING, mask=is_pooled)


@triton.jit(
    do_not_specialize=["table_stride_b", "window"],
    do_not_specialize_on_alignment=["positions_ptr", "cu_ptr", "remaining_ptr", "table_ptr", "len_ptr"],
)
def mean_kernel(
    positions_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    remaining_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    means_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    window: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """One program per (sequence, KV head), if the prompt ends in this step: ``means_ptr`` [B, K] gets the mean score of the
    tokens at positions up to the last one minus ``window``.
    """
    b = tl.program_id(0)
    head = tl.program_id(1)
    n = tl.load(len_ptr + b).to(tl.int32)
    begin = tl.load(cu_ptr + b)
    n_new = (tl.load(cu_ptr + b + 1) - begin).to(tl.int32)
    last = last_position(positions_ptr, remaining_ptr, begin, n_new, 256)
    if last < 0:
        return
    table_ptr += b * table_stride_b
    total = tl.zeros([BLOCK_S], tl.float32)
    n_before = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, n, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at = (tl.load(table_ptr + s // P, mask=s < n, other=0) * K + head) * P + s % P
        is_before = (s < n) & (tl.load(token_positions_ptr + at, mask=s < n, other=2**62) <= last - window)
        total += tl.load(scores_ptr + at, mask=is_before, other=0.0)
        n_before += is_before.to(tl.int32)
    mean = tl.sum(total, 0) / tl.maximum(tl.sum(n_before, 0), 1).to(tl.float32)
    tl.store(means_ptr + b * K + head, mean)


@triton.jit(
    do_not_specialize=["table_stride_b", "window"],
    do_not_specialize_on_alignment=["positions_ptr", "cu_ptr", "remaining_ptr", "table_ptr", "len_ptr"],
)
def norm_kernel(
    positions_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    remaining_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    means_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    window: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """After ``mean_kernel``, one program per (BLOCK_S tokens of a sequence, sequence, KV head): raises scores to the mean and
    multiplies them by the norms of the values, of all KV heads together unless PER_HEAD.
    """
    b = tl.program_id(1)
    head = tl.program_id(2)
    first_slot = tl.program_id(0) * BLOCK_S
    n = tl.load(len_ptr + b).to(tl.int32)
    begin = tl.load(cu_ptr + b)
    n_new = (tl.load(cu_ptr + b + 1) - begin).to(tl.int32)
    if (first_slot >= n) | (n_new == 0):
        return
    last = last_position(positions_ptr, remaining_ptr, begin, n_new, 256)
    if last < 0:
        return
    s = first_slot + tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    inside = s < n
    page = tl.load(table_ptr + b * table_stride_b + s // P, mask=inside, other=0)
    at = (page * K + head) * P + s % P
    squares = tl.zeros([BLOCK_S], tl.float32)
    for nth in range(1 if PER_HEAD else K):
        of = head if PER_HEAD else nth
        row = ((page * 2 + 1) * K + of) * P + s % P
        v = tl.load(kv_ptr + row[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        squares += tl.sum(v * v, 1)
    is_before = inside & (tl.load(token_positions_ptr + at, mask=inside, other=2**62) <= last - window)
    score = tl.load(scores_ptr + at, mask=inside, other=0.0)
    score = tl.where(is_before, tl.maximum(score, tl.load(means_ptr + b * K + head)), score)
    tl.store(scores_ptr + at, score * tl.sqrt(squares), mask=inside)


def run(args: Arguments[Tensor]) -> tuple[()]:
    """Spec: ``spec.py``. Updates scores in place. Launches on the current stream and does not wait.

    Temporary memory: for pooling, twice that of ``scores``, which is 2 / D of the size of half-precision keys and values; if
    KV heads share their scores, as much as the scores of the step's sequences.
    """
    n_tokens, n_heads, head_size = args.q.shape
    n_kv_heads, n_sequences = args.kv.shape[2], args.kv_len.shape[1]
    group = n_heads // n_kv_heads
    n_slots = args.page_table.shape[2] * args.page_size
    tiles = (-(-n_slots // _BLOCK_S), n_sequences)
    sizes = {"K": n_kv_heads, "P": args.page_size}
    step: dict[str, Any] = {
        "positions_ptr": args.positions,
        "cu_ptr": args.cu_tokens,
        "remaining_ptr": args.prompt_remaining,
        "table_ptr": args.page_table[args.layer],
        "len_ptr": args.kv_len[args.layer],
        "token_positions_ptr": args.token_positions,
        "scores_ptr": args.scores,
        "table_stride_b": args.page_table.stride(1),
    }
    launch(
        zero_kernel,
        (n_tokens,),
        slots_ptr=args.slots[args.layer],
        scores_ptr=args.scores,
        K=n_kv_heads,
        P=args.page_size,
        BLOCK_K=power_of_2(n_kv_heads),
    )
    # With scores per head the kernel does not access parts.
    parts = (
        args.scores
        if args.per_head
        else torch.empty((n_sequences, n_kv_heads, n_slots), dtype=args.scores.dtype, device=args.scores.device)
    )
    shape = _receive_shape(args.kv.itemsize, head_size, group, is_prompt=n_tokens > 2 * n_sequences)
    launch(
        receive_kernel,
        (-(-n_slots // shape["BLOCK_S"]), n_sequences, n_kv_heads),
        q_ptr=args.q.contiguous(),
        lse_ptr=args.lse,
        kv_ptr=args.kv,
        parts_ptr=parts,
        scale=args.scale,
        soft_cap=float(args.soft_cap),
        counted_from=-1 if args.generated else 0,
        counted_to=args.window or 2**31 - 1,
        n_slots=n_slots,
        H=n_heads,
        D=head_size,
        CAPPED=int(args.soft_cap > 0),
        PER_HEAD=args.per_head,
        BLOCK_D=max(16, power_of_2(head_size)),
        LOG2_E=_LOG2_E,
        MAXIMUM=args.maximum,
        **step,
        **sizes,
        **shape,
    )
    if not args.per_head:
        shared = {name: step[name] for name in ("cu_ptr", "table_ptr", "len_ptr", "scores_ptr", "table_stride_b")}
        launch(share_kernel, tiles, parts_ptr=parts, n_slots=n_slots, BLOCK_S=_BLOCK_S, MAXIMUM=args.maximum, **shared, **sizes)
    if args.average or args.pooling > 1:
        # Without pooling nothing is sorted, and the kernel accesses neither of the two.
        sorted_scores = torch.empty_like(args.scores) if args.pooling > 1 else args.scores
        ranks = torch.empty_like(args.scores, dtype=torch.int32) if args.pooling > 1 else args.scores
        finish = step | {"sorted_ptr": sorted_scores, "ranks_ptr": ranks, "window": args.window, "BLOCK_S": _BLOCK_S}
        launch(
            finish_kernel, (*tiles, n_kv_heads), AVERAGE=args.average, SORT=int(args.pooling > 1), BLOCK_R=64, **finish, **sizes
        )
        if args.pooling > 1:
            launch(pool_kernel, (*tiles, n_kv_heads), POOLING=args.pooling, **finish, **sizes)
    if args.value_norm:
        means = torch.empty((n_sequences, n_kv_heads), dtype=args.scores.dtype, device=args.scores.device)
        norm: dict[str, Any] = step | {"means_ptr": means, "window": args.window}
        launch(mean_kernel, (n_sequences, n_kv_heads), BLOCK_S=256, **norm, **sizes)
        launch(
            norm_kernel,
            (*tiles, n_kv_heads),
            kv_ptr=args.kv,
            D=head_size,
            PER_HEAD=args.per_head,
            BLOCK_D=power_of_2(head_size),
            BLOCK_S=_BLOCK_S,
            **norm,
            **sizes,
        )
    return ()


def _receive_shape(itemsize: int, head_size: int, group: int, *, is_prompt: bool) -> dict[str, int]:
    """Keys and query rows per tile; for prompts in half precision both suit the tensor cores' matrix sizes."""
    if itemsize == 2 and is_prompt and head_size <= 128:
        return {"BLOCK_S": 64, "BLOCK_M": max(128, power_of_2(group)), "warps": 4, "stages": 2}
    if itemsize == 2:
        return {"BLOCK_S": 64, "BLOCK_M": max(32 if is_prompt else 16, power_of_2(group)), "warps": 4, "stages": 2}
    return {"BLOCK_S": 32, "BLOCK_M": max(16, power_of_2(group)), "warps": 4, "stages": 1}
