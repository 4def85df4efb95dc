"""EvictTokens on the GPU: thresholds that separate kept from evicted tokens, target slots, then moves within the pages.

A step that evicts nothing costs three launches whose programs read one flag each.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trt_kv.plugins import lots
from trt_kv.plugins.evict_tokens.arguments import Arguments
from trt_kv.plugins.ranking_triton import extended, next_bytes, ordered_key
from trt_kv.plugins.shares_triton import kept_of_share, whole_part_of_share
from trt_kv.plugins.triton_launch import launch, power_of_2

PRIME = tl.constexpr(lots.PRIME)
LOTS = tl.constexpr(lots.LOTS)
ROUND_2, ROUND_3, ROUND_4, ROUND_5 = (tl.constexpr(constant) for constant in lots.ROUNDS[2:])
ALL = tl.constexpr(2**62)
"""Larger than every position and every ranking key."""
LARGEST = tl.constexpr(2**32 - 1)
"""The largest key: positions are keys."""
LOWEST, HIGHEST, WORTH, TIE = (tl.constexpr(what) for what in range(4))


@triton.jit
def scrambled(x: tl.tensor, CONSTANT: tl.constexpr) -> tl.tensor:
    """``lots.scrambled`` for int64."""
    base = (x + CONSTANT) % PRIME
    square = base * base % PRIME
    return square * square % PRIME * base % PRIME


@triton.jit
def worth_of(
    position: tl.tensor,
    at: tl.tensor,
    mask: tl.tensor,
    scores_ptr: tl.tensor,
    lot_base: tl.tensor,
    head: tl.tensor,
    RANKING: tl.constexpr,
) -> tl.tensor:
    """Keys that tokens are ranked by; ``at``: where their scores are."""
    if RANKING == 0:
        worth = ordered_key(tl.load(scores_ptr + at, mask=mask, other=0.0))
    elif RANKING == 1:
        worth = position
    else:
        key = scrambled(tl.zeros([], tl.int64) + lot_base + head, ROUND_2)
        worth = scrambled(scrambled(scrambled(key + position, ROUND_3), ROUND_4), ROUND_5) % LOTS
    return worth


@triton.jit
def is_chosen(position: tl.tensor, worth: tl.tensor, thresholds_ptr: tl.tensor) -> tl.tensor:
    """Mask of the tokens to keep: the first, the last, and the best of the others, ties by lower position."""
    low = tl.load(thresholds_ptr)
    high = tl.load(thresholds_ptr + 1)
    least = tl.load(thresholds_ptr + 2)
    last = tl.load(thresholds_ptr + 3)
    is_best = (worth > least) | ((worth == least) & (position <= last))
    return (position <= low) | (position >= high) | is_best


@triton.jit
def nth_largest(
    wanted: tl.tensor,
    table_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    lot_base: tl.tensor,
    n: tl.tensor,
    head: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    least: tl.tensor,
    WHAT: tl.constexpr,
    RANKING: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The ``wanted``-th lowest or highest position, key between ``low`` and ``high``, or position of those with key ``least``;
    its rank among equal ones, and their number. Lowest positions are searched as ``LARGEST`` minus the position.
    """
    prefix = tl.zeros([], tl.int64)
    n_equal = tl.zeros([], tl.int32)
    for nth in range(4):
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, n, BLOCK_S):
            s = start + tl.arange(0, BLOCK_S)
            mask = s < n
            at = (tl.load(table_ptr + s // P, mask=mask, other=0) * K + head) * P + s % P
            position = tl.load(token_positions_ptr + at, mask=mask, other=0)
            keys = position if WHAT == HIGHEST else LARGEST - position
            if (WHAT == WORTH) | (WHAT == TIE):
                mask = mask & (position > low) & (position < high)
                worth = worth_of(position, at, mask, scores_ptr, lot_base, head, RANKING)
                if WHAT == WORTH:
                    keys = worth
                else:
                    mask = mask & (worth == least)
            histogram += next_bytes(keys, mask, prefix, nth)
        prefix, wanted, n_equal = extended(prefix, wanted, histogram)
    return prefix, wanted, n_equal


@triton.jit(
    do_not_specialize=["table_stride_b", "kept_tokens", "floor", "drop", "sinks", "recent", "lot_base"],
    do_not_specialize_on_alignment=["evict_ptr", "budget_ptr", "table_ptr", "len_ptr"],
)
def threshold_kernel(
    evict_ptr: tl.tensor,
    budget_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    kept_share: tl.tensor,
    recent_share: tl.tensor,
    table_stride_b: tl.tensor,
    kept_tokens: tl.tensor,
    floor: tl.tensor,
    drop: tl.tensor,
    sinks: tl.tensor,
    recent: tl.tensor,
    lot_base: tl.tensor,
    HAS_BUDGET: tl.constexpr,
    RANKING: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """One program per (sequence, KV head): the number of tokens to keep, and the thresholds that select them."""
    b = tl.program_id(0)
    head = tl.program_id(1)
    flag = tl.load(evict_ptr + b)
    n_cached = tl.load(len_ptr + b)
    if flag == 0:
        tl.store(kept_ptr + b, n_cached, mask=head == 0)
        return
    if HAS_BUDGET:
        target = tl.load(budget_ptr + b)
    else:
        target = kept_of_share(n_cached, kept_share) + kept_tokens
    target = tl.where(flag == 2, n_cached - drop, target)
    target = tl.minimum(tl.maximum(target, tl.maximum(floor, 1)), n_cached)
    recents = tl.maximum(whole_part_of_share(tl.maximum(target - sinks, 0), recent_share), recent)
    kept = tl.minimum(tl.maximum(target, sinks + recents), n_cached)
    tl.store(kept_ptr + b, kept, mask=head == 0)
    thresholds_ptr += (b * K + head) * 4
    if kept == n_cached:
        tl.store(thresholds_ptr, tl.full([], ALL, tl.int64))
        return

    table_ptr += b * table_stride_b
    n = n_cached.to(tl.int32)
    n_below = 0
    newest = tl.full([], -1, tl.int64)
    for start in range(0, n, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at = (tl.load(table_ptr + s // P, mask=s < n, other=0) * K + head) * P + s % P
        position = tl.load(token_positions_ptr + at, mask=s < n, other=-1)
        n_below += tl.sum(((s < n) & (position < sinks)).to(tl.int32), 0)
        newest = tl.maximum(newest, tl.max(position, 0))
    n_above = 0
    for start in range(0, n, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        at = (tl.load(table_ptr + s // P, mask=s < n, other=0) * K + head) * P + s % P
        position = tl.load(token_positions_ptr + at, mask=s < n, other=-1)
        n_above += tl.sum(((s < n) & (position > newest - recents)).to(tl.int32), 0)

    # Usually the first positions are 0, 1, ... and the last are consecutive: then no search is needed.
    none = tl.zeros([], tl.int64)
    low = none + sinks - 1
    if n_below != sinks:
        lowest, _, _ = nth_largest(
            (none + sinks).to(tl.int32), table_ptr, token_positions_ptr, scores_ptr, lot_base, n, head, none, none, none,
            LOWEST, RANKING, K, P, BLOCK_S,
        )  # fmt: skip
        low = LARGEST - lowest
    high = newest - recents + 1
    if n_above != recents:
        high, _, _ = nth_largest(
            recents.to(tl.int32), table_ptr, token_positions_ptr, scores_ptr, lot_base, n, head, none, none, none,
            HIGHEST, RANKING, K, P, BLOCK_S,
        )  # fmt: skip

    wanted = (kept - sinks - recents).to(tl.int32)
    least = none + ALL
    last = none
    if wanted > 0:
        if n_cached - kept == 1:
            for start in range(0, n, BLOCK_S):
                s = start + tl.arange(0, BLOCK_S)
                at = (tl.load(table_ptr + s // P, mask=s < n, other=0) * K + head) * P + s % P
                position = tl.load(token_positions_ptr + at, mask=s < n, other=-1)
                mask = (s < n) & (position > low) & (position < high)
                worth = worth_of(position, at, mask, scores_ptr, lot_base, head, RANKING)
                worst = tl.min(tl.where(mask, worth, ALL), 0)
                latest = tl.max(tl.where(mask & (worth == worst), position, -1), 0) - 1
                last = tl.where(worst < least, latest, tl.where(worst == least, tl.maximum(last, latest), last))
                least = tl.minimum(least, worst)
        else:
            least, wanted, n_equal = nth_largest(
                wanted, table_ptr, token_positions_ptr, scores_ptr, lot_base, n, head, low, high, none,
                WORTH, RANKING, K, P, BLOCK_S,
            )  # fmt: skip
            last = none + ALL
            if wanted < n_equal:
                latest, _, _ = nth_largest(
                    wanted, table_ptr, token_positions_ptr, scores_ptr, lot_base, n, head, low, high, least,
                    TIE, RANKING, K, P, BLOCK_S,
                )  # fmt: skip
                last = LARGEST - latest
    tl.store(thresholds_ptr, low)
    tl.store(thresholds_ptr + 1, high)
    tl.store(thresholds_ptr + 2, least)
    tl.store(thresholds_ptr + 3, last)


@triton.jit(
    do_not_specialize=["table_stride_b", "lot_base"], do_not_specialize_on_alignment=["evict_ptr", "table_ptr", "len_ptr"]
)
def source_kernel(
    evict_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    kept_ptr: tl.tensor,
    thresholds_ptr: tl.tensor,
    sources_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    n_moved_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    lot_base: tl.tensor,
    RANKING: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """One program per (BLOCK_S slots of a sequence, sequence, KV head): source and target slots of the moves.

    Move number r takes the content of slot sources[r] to slot r or, with flag 2, to slot targets[r]. Both lists are indexed
    like the sequence's slots. If tokens go to the front in order of position, the evicted ones follow in any order, so that the
    moves are a permutation of the slots.
    """
    b = tl.program_id(1)
    head = tl.program_id(2)
    first_slot = tl.program_id(0) * BLOCK_S
    flag = tl.load(evict_ptr + b)
    n = tl.load(len_ptr + b).to(tl.int32)
    kept = tl.load(kept_ptr + b).to(tl.int32)
    if (flag == 0) | (first_slot >= n):
        return
    is_last = first_slot + BLOCK_S >= n
    table_ptr += b * table_stride_b
    thresholds_ptr += (b * K + head) * 4
    s = first_slot + tl.arange(0, BLOCK_S)
    at = (tl.load(table_ptr + s // P, mask=s < n, other=0) * K + head) * P + s % P
    position = tl.load(token_positions_ptr + at, mask=s < n, other=0)
    worth = worth_of(position, at, s < n, scores_ptr, lot_base, head, RANKING)
    stays = is_chosen(position, worth, thresholds_ptr)
    oldest = tl.min(tl.where(s < n, position, ALL), 0)
    newest = tl.max(tl.where(s < n, position, -1), 0)
    is_front = s < kept
    to_position = tl.zeros([BLOCK_S], tl.int32)
    n_gone = 0
    n_free = 0
    n_behind = 0
    end = n if flag == 1 else first_slot
    for start in range(0, end, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        there = (tl.load(table_ptr + r // P, mask=r < n, other=0) * K + head) * P + r % P
        others = tl.load(token_positions_ptr + there, mask=r < n, other=0)
        others_stay = is_chosen(others, worth_of(others, there, r < n, scores_ptr, lot_base, head, RANKING), thresholds_ptr)
        is_before = r < first_slot
        n_gone += tl.sum((is_before & (others_stay == 0)).to(tl.int32), 0)
        n_free += tl.sum((is_before & (others_stay == 0) & (r < kept)).to(tl.int32), 0)
        n_behind += tl.sum((is_before & others_stay & (r >= kept)).to(tl.int32), 0)
        counted = others_stay & (r < n)
        lowest = tl.min(tl.where(r < n, others, ALL), 0)
        highest = tl.max(tl.where(r < n, others, -1), 0)
        if (lowest < newest) & (highest > oldest):
            is_smaller = others.to(tl.int32)[None, :] < position.to(tl.int32)[:, None]
            to_position += tl.sum((counted[None, :] & is_smaller).to(tl.int32), 1)
        else:
            to_position += tl.sum((counted & (others < oldest)).to(tl.int32), 0)

    inside = s < n
    if flag == 1:
        gone = (inside & (stays == 0)).to(tl.int32)
        rank = tl.where(stays, to_position, kept + n_gone + tl.cumsum(gone) - 1)
        to = (tl.load(table_ptr + rank // P, mask=inside, other=0) * K + head) * P + rank % P
        tl.store(sources_ptr + to, s, mask=inside)
        tl.store(n_moved_ptr + b * K + head, kept, mask=is_last)
    else:
        free = (inside & is_front & (stays == 0)).to(tl.int32)
        rank = n_free + tl.cumsum(free) - 1
        to = (tl.load(table_ptr + rank // P, mask=free == 1, other=0) * K + head) * P + rank % P
        tl.store(targets_ptr + to, s, mask=free == 1)
        behind = (inside & (s >= kept) & stays).to(tl.int32)
        rank = n_behind + tl.cumsum(behind) - 1
        to = (tl.load(table_ptr + rank // P, mask=behind == 1, other=0) * K + head) * P + rank % P
        tl.store(sources_ptr + to, s, mask=behind == 1)
        tl.store(n_moved_ptr + b * K + head, n_behind + tl.sum(behind, 0), mask=is_last)


@triton.jit(do_not_specialize=["table_stride_b"], do_not_specialize_on_alignment=["evict_ptr", "table_ptr", "len_ptr"])
def move_kernel(
    evict_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    sources_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    n_moved_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """One program per (sequence, KV head), which moves its tokens in sequence.

    If no source precedes its target, moving in ascending order overwrites nothing unread. Otherwise tokens are moved one at a
    time along the cycles of the permutation. That is slow and rare: it takes a sequence that evicted tokens while decoding and
    is shrunk again.
    """
    b = tl.program_id(0)
    head = tl.program_id(1)
    flag = tl.load(evict_ptr + b)
    if flag == 0:
        return
    n = tl.load(len_ptr + b).to(tl.int32)
    n_moved = tl.load(n_moved_ptr + b * K + head)
    table_ptr += b * table_stride_b
    d = tl.arange(0, BLOCK_D)
    tile = tl.arange(0, BLOCK_S)
    is_forward = 1
    if flag == 1:
        for start in range(0, n_moved, BLOCK_S):
            r = start + tile
            at = (tl.load(table_ptr + r // P, mask=r < n_moved, other=0) * K + head) * P + r % P
            source = tl.load(sources_ptr + at, mask=r < n_moved, other=2147483647)
            is_forward = tl.minimum(is_forward, tl.min((source >= r).to(tl.int32), 0))
    if is_forward == 1:
        for start in range(0, n_moved, BLOCK_S):
            r = start + tile
            mask = r < n_moved
            at = (tl.load(table_ptr + r // P, mask=mask, other=0) * K + head) * P + r % P
            source = tl.load(sources_ptr + at, mask=mask, other=0)
            target = r
            if flag == 2:
                target = tl.load(targets_ptr + at, mask=mask, other=0)
            mask = mask & (source != target)
            page = tl.load(table_ptr + source // P, mask=mask, other=0)
            to_page = tl.load(table_ptr + target // P, mask=mask, other=0)
            source_at = (page * K + head) * P + source % P
            target_at = (to_page * K + head) * P + target % P
            position = tl.load(token_positions_ptr + source_at, mask=mask, other=0)
            score = tl.load(scores_ptr + source_at, mask=mask, other=0.0)
            both = mask[:, None] & (d < D)[None, :]
            source_row = ((source_at + page * K * P) * D)[:, None] + d[None, :]
            target_row = ((target_at + to_page * K * P) * D)[:, None] + d[None, :]
            k = tl.load(kv_ptr + source_row, mask=both, other=0.0)
            v = tl.load(kv_ptr + source_row + K * P * D, mask=both, other=0.0)
            # A tile's sources may be among its targets.
            tl.debug_barrier()
            tl.store(token_positions_ptr + target_at, position, mask=mask)
            tl.store(scores_ptr + target_at, score, mask=mask)
            tl.store(kv_ptr + target_row, k, mask=both)
            tl.store(kv_ptr + target_row + K * P * D, v, mask=both)
    else:
        for first in range(n):
            page = tl.load(table_ptr + first // P)
            at = (page * K + head) * P + first % P
            source = tl.load(sources_ptr + at)
            if source != first:
                row = (at + page * K * P) * D + d
                position = tl.load(token_positions_ptr + at)
                score = tl.load(scores_ptr + at)
                k = tl.load(kv_ptr + row, mask=d < D, other=0.0)
                v = tl.load(kv_ptr + row + K * P * D, mask=d < D, other=0.0)
                target = first
                while source != first:
                    from_page = tl.load(table_ptr + source // P)
                    from_at = (from_page * K + head) * P + source % P
                    from_row = (from_at + from_page * K * P) * D + d
                    next_source = tl.load(sources_ptr + from_at)
                    next_position = tl.load(token_positions_ptr + from_at)
                    next_score = tl.load(scores_ptr + from_at)
                    next_k = tl.load(kv_ptr + from_row, mask=d < D, other=0.0)
                    next_v = tl.load(kv_ptr + from_row + K * P * D, mask=d < D, other=0.0)
                    tl.debug_barrier()
                    tl.store(sources_ptr + at, target)
                    tl.store(token_positions_ptr + at, next_position)
                    tl.store(scores_ptr + at, next_score)
                    tl.store(kv_ptr + row, next_k, mask=d < D)
                    tl.store(kv_ptr + row + K * P * D, next_v, mask=d < D)
                    target = source
                    source = next_source
                    at = from_at
                    row = from_row
                tl.debug_barrier()
                tl.store(sources_ptr + at, target)
                tl.store(token_positions_ptr + at, position)
                tl.store(scores_ptr + at, score)
                tl.store(kv_ptr + row, k, mask=d < D)
                tl.store(kv_ptr + row + K * P * D, v, mask=d < D)
                # Slots after ``first`` on the cycle are marked as done by being their own source.
                tl.debug_barrier()


def run(args: Arguments[Tensor]) -> tuple[Tensor]:
    """Spec: ``spec.py``. Returns (kept [B],); updates kv, token_positions and scores in place.

    Launches on the current stream and does not wait. Temporary memory: twice that of ``scores``, which is 2 / D of the size of
    half-precision keys and values. Positions must be below 2**31.
    """
    n_kv_heads, head_size = args.kv.shape[2], args.kv.shape[4]
    table_BT, len_B = args.page_table[args.layer], args.kv_len[args.layer]
    n_sequences, n_table = table_BT.shape
    kept = torch.empty_like(len_B)
    sources, targets = torch.empty((2, *args.scores.shape), dtype=torch.int32, device=args.scores.device)
    n_moved = torch.empty((n_sequences, n_kv_heads), dtype=torch.int32, device=args.kv.device)
    step: dict[str, Any] = {
        "evict_ptr": args.evict,
        "table_ptr": table_BT,
        "len_ptr": len_B,
        "token_positions_ptr": args.token_positions,
        "scores_ptr": args.scores,
        "table_stride_b": table_BT.stride(0),
        "K": n_kv_heads,
        "P": args.page_size,
    }
    choice: dict[str, Any] = {
        "kept_ptr": kept,
        "thresholds_ptr": torch.empty((n_sequences, n_kv_heads, 4), dtype=torch.int64, device=args.kv.device),
        "lot_base": lots.scrambled(lots.scrambled(args.seed, lots.ROUNDS[0]) + args.layer, lots.ROUNDS[1]),
        "RANKING": args.ranking,
    }
    moves: dict[str, Any] = {"sources_ptr": sources, "targets_ptr": targets, "n_moved_ptr": n_moved}
    launch(
        threshold_kernel,
        (n_sequences, n_kv_heads),
        warps=8,
        budget_ptr=len_B if args.budget is None else args.budget,
        kept_share=float(args.kept_share),
        recent_share=float(args.recent_share),
        kept_tokens=args.kept_tokens,
        floor=args.floor,
        drop=args.drop,
        sinks=args.sinks,
        recent=args.recent,
        HAS_BUDGET=int(args.budget is not None),
        BLOCK_S=512,
        **step,
        **choice,
    )
    tiles = (-(-n_table * args.page_size // 64), n_sequences, n_kv_heads)
    launch(source_kernel, tiles, warps=8, BLOCK_S=64, BLOCK_R=128, **step, **choice, **moves)
    launch(
        move_kernel,
        (n_sequences, n_kv_heads),
        stages=1,
        kv_ptr=args.kv,
        D=head_size,
        BLOCK_D=power_of_2(head_size),
        BLOCK_S=32,
        **step,
        **moves,
    )
    return (kept,)
