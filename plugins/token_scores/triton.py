"""TokenScores on the GPU: column sums of the attention matrix from the log-sum-exps, then averaging and pooling.

Every program owns the slots of one tile, so that nothing is added by two. Decision 19 tells how work is divided.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trt_kv.plugins.triton_launch import launch, power_of_2

_LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize_on_alignment=["slots_ptr"])
def zero_kernel(slots_ptr: tl.tensor, scores_ptr: tl.tensor, K: tl.constexpr, P: tl.constexpr, BLOCK_K: tl.constexpr) -> None:
    """One program per token of the step: its scores start at 0."""
    slot = tl.load(slots_ptr + tl.program_id(0))
    heads = tl.arange(0, BLOCK_K)
    tl.store(scores_ptr + (slot // P * K + heads) * P + slot % P, tl.zeros([BLOCK_K], tl.float32), mask=heads < K)


@triton.jit(
    do_not_specialize=["table_stride_b", "counted_from", "counted_to"],
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
    scale: tl.tensor,
    table_stride_b: tl.tensor,
    counted_from: tl.tensor,
    counted_to: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    PER_HEAD: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_S: tl.constexpr,
    LOG2_E: tl.constexpr,
) -> None:
    """One program per (BLOCK_S tokens of a sequence, sequence, KV head), or for all KV heads where these share their scores.

    Keys ask and queries answer: a tile of keys stays, queries stream by, from the first that counts and sees one of the keys.
    A query counts that has ``counted_from`` to ``counted_to`` - 1 prompt tokens behind it.
    """
    b = tl.program_id(1)
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
    inside = s < n
    page = tl.load(table_ptr + b * table_stride_b + s // P, mask=inside, other=0)
    # Where KV heads share their scores they hold the same tokens: the first one's positions are everybody's.
    mine = tl.program_id(2)
    position = tl.load(token_positions_ptr + (page * K + mine) * P + s % P, mask=inside, other=2**62)
    oldest = tl.min(position, 0)
    low = n_new
    high = 0
    for start in range(0, n_new, 256):
        row = start + tl.arange(0, 256)
        asked = tl.load(positions_ptr + begin + row, mask=row < n_new, other=-1)
        remaining = tl.load(remaining_ptr + begin + row, mask=row < n_new, other=-2)
        is_useful = (remaining >= counted_from) & (remaining < counted_to) & (asked >= oldest)
        low = tl.minimum(low, tl.min(tl.where(is_useful, row, n_new), 0))
        high = tl.maximum(high, tl.max(tl.where(is_useful, row + 1, 0), 0))
    if high == 0:
        return
    HEADS: tl.constexpr = 1 if PER_HEAD else K
    received = tl.zeros([BLOCK_S], tl.float32)
    for nth in range(HEADS):
        head = nth + mine
        at = ((page * 2 * K + head) * P + s % P) * D
        k = tl.load(kv_ptr + at[:, None] + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
        for start in range(low, high, ROWS):
            row = start + m // G
            is_row = (m // G < ROWS) & (row < high)
            token = begin + row
            asked = tl.load(positions_ptr + token, mask=is_row, other=-1)
            remaining = tl.load(remaining_ptr + token, mask=is_row, other=-2)
            is_counted = (remaining >= counted_from) & (remaining < counted_to)
            at_row = token * H + head * G + m % G
            q = tl.load(q_ptr + at_row[None, :] * D + d[:, None], mask=is_counted[None, :] & (d < D)[:, None], other=0.0)
            lse = tl.load(lse_ptr + at_row, mask=is_counted, other=0.0)
            logits = tl.dot(k, q, input_precision="ieee") * (scale * LOG2_E)
            visible = (position[:, None] <= asked[None, :]) & is_counted[None, :]
            received += tl.sum(tl.where(visible, tl.exp2(logits - lse[None, :] * LOG2_E), 0.0), 1)
    for nth in range(HEADS):
        to = scores_ptr + (page * K + nth + mine) * P + s % P
        tl.store(to, tl.load(to, mask=inside, other=0.0) + received / (G * HEADS), mask=inside)


@triton.jit
def last_position(
    positions_ptr: tl.tensor, remaining_ptr: tl.tensor, begin: tl.tensor, n_new: tl.tensor, BLOCK: tl.constexpr
) -> tl.tensor:
    """The position of the sequence's last prompt token if this step holds it, else -1."""
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
    """One program per (BLOCK_S tokens of a sequence, sequence, KV head), where the prompt ends in this step: divides scores by
    the number of their queries, and writes those to be pooled to ``sorted_ptr`` in order of position, 0 for the others.

    ``sorted_ptr`` is a pool like ``scores_ptr``: the score of rank r lies where slot r of the sequence does, and ``ranks_ptr``
    holds each slot's rank, the number of smaller positions. Against a tile that is wholly smaller or larger, as almost all
    are in a prompt whose tokens lie in order, no two tokens are compared.
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
    """After ``finish_kernel``, by the same division of work: means over neighbours in order of position."""
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


def run(
    *,
    q: Tensor,
    lse: Tensor,
    positions: Tensor,
    cu_tokens: Tensor,
    prompt_remaining: Tensor,
    slots: Tensor,
    page_table: Tensor,
    kv_len: Tensor,
    kv: Tensor,
    token_positions: Tensor,
    scores: Tensor,
    layer: int,
    scale: float,
    page_size: int,
    window: int = 0,
    per_head: int = 0,
    pooling: int = 1,
    average: int = 0,
    generated: int = 0,
) -> tuple[()]:
    """Spec: ``spec.py``. Updates scores in place. Launches on the current stream and does not wait.

    Pooling takes twice the memory of ``scores`` for a while: 2 / D of what half-precision keys and values take.
    """
    n_tokens, n_heads, head_size = q.shape
    n_kv_heads, n_sequences = kv.shape[2], kv_len.shape[1]
    group = n_heads // n_kv_heads
    block_slots = 64 if kv.itemsize == 2 else 32
    tile_rows = 32 if n_tokens > 2 * n_sequences and kv.itemsize == 2 else 16
    tiles = (-(-page_table.shape[2] * page_size // block_slots), n_sequences)
    sizes = {"K": n_kv_heads, "P": page_size, "BLOCK_S": block_slots}
    step: dict[str, Any] = {
        "positions_ptr": positions,
        "cu_ptr": cu_tokens,
        "remaining_ptr": prompt_remaining,
        "table_ptr": page_table[layer],
        "len_ptr": kv_len[layer],
        "token_positions_ptr": token_positions,
        "scores_ptr": scores,
        "table_stride_b": page_table.stride(1),
    }
    launch(
        zero_kernel,
        (n_tokens,),
        slots_ptr=slots[layer],
        scores_ptr=scores,
        K=n_kv_heads,
        P=page_size,
        BLOCK_K=power_of_2(n_kv_heads),
    )
    launch(
        receive_kernel,
        (*tiles, n_kv_heads if per_head else 1),
        stages=2 if kv.itemsize == 2 else 1,
        q_ptr=q.contiguous(),
        lse_ptr=lse,
        kv_ptr=kv,
        scale=scale,
        counted_from=-1 if generated else 0,
        counted_to=window or 2**31 - 1,
        H=n_heads,
        D=head_size,
        PER_HEAD=per_head,
        BLOCK_D=max(16, power_of_2(head_size)),
        BLOCK_M=max(tile_rows, power_of_2(group)),
        LOG2_E=_LOG2_E,
        **step,
        **sizes,
    )
    if average or pooling > 1:
        # Without pooling nothing is sorted, and the kernel touches neither of the two.
        sorted_scores = torch.empty_like(scores) if pooling > 1 else scores
        ranks = torch.empty_like(scores, dtype=torch.int32) if pooling > 1 else scores
        step |= {"sorted_ptr": sorted_scores, "ranks_ptr": ranks, "window": window}
        launch(finish_kernel, (*tiles, n_kv_heads), AVERAGE=average, SORT=int(pooling > 1), BLOCK_R=64, **step, **sizes)
    if pooling > 1:
        launch(pool_kernel, (*tiles, n_kv_heads), POOLING=pooling, **step, **sizes)
    return ()
