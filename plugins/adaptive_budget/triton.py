"""AdaptiveBudget on the GPU: one row of attention per sequence, arranged in the order in which tokens are kept, summed and cut.

A step that computes no budget costs four launches whose programs read one flag each.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trt_kv.plugins.adaptive_budget.arguments import Arguments
from trt_kv.plugins.adaptive_budget.spec import NO_WEIGHT
from trt_kv.plugins.attention_kernels import capped
from trt_kv.plugins.ranking_triton import ordered_key
from trt_kv.plugins.triton_launch import launch, power_of_2

_TILE_PLACES = 256


@triton.jit
def is_wanted(
    evict_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    len_ptr: tl.tensor,
    b: tl.tensor,
    n_protected: tl.tensor,
    NEEDS_QUERY: tl.constexpr,
) -> tl.tensor:
    """Whether a budget is computed: the flag is set, there are candidates, and a query in this step if row 0 needs it."""
    wanted = (tl.load(evict_ptr + b) == 1) & (tl.load(len_ptr + b) > n_protected)
    if NEEDS_QUERY:
        wanted = wanted & (tl.load(cu_ptr + b + 1) > tl.load(cu_ptr + b))
    return wanted


@triton.jit(
    do_not_specialize=["table_stride_b", "n_protected"],
    do_not_specialize_on_alignment=["evict_ptr", "cu_ptr", "table_ptr", "len_ptr"],
)
def order_kernel(
    evict_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    token_positions_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    n_protected: tl.tensor,
    NEEDS_QUERY: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """One program per (BLOCK_S slots of a sequence, sequence, KV head): each slot's rank, the number of smaller positions.

    Tiles whose positions are all smaller or all larger, which is nearly all of them in a prompt, need no comparison per token.
    """
    b = tl.program_id(1)
    head = tl.program_id(2)
    first_slot = tl.program_id(0) * BLOCK_S
    n = tl.load(len_ptr + b).to(tl.int32)
    if (is_wanted(evict_ptr, cu_ptr, len_ptr, b, n_protected, NEEDS_QUERY) == 0) | (first_slot >= n):
        return
    table_ptr += b * table_stride_b
    s = first_slot + tl.arange(0, BLOCK_S)
    at = (tl.load(table_ptr + s // P, mask=s < n, other=0) * K + head) * P + s % P
    position = tl.load(token_positions_ptr + at, mask=s < n, other=0).to(tl.int32)
    oldest = tl.min(tl.where(s < n, position, 2147483647), 0)
    newest = tl.max(position, 0)
    rank = tl.zeros([BLOCK_S], tl.int32)
    for start in range(0, n, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        there = (tl.load(table_ptr + r // P, mask=r < n, other=0) * K + head) * P + r % P
        others = tl.load(token_positions_ptr + there, mask=r < n, other=2147483647).to(tl.int32)
        if (tl.min(others, 0) < newest) & (tl.max(others, 0) > oldest):
            rank += tl.sum((others[None, :] < position[:, None]).to(tl.int32), 1)
        else:
            rank += tl.sum((others < oldest).to(tl.int32), 0)
    tl.store(ranks_ptr + at, rank, mask=s < n)


@triton.jit(
    do_not_specialize=["table_stride_b", "n_protected", "sinks"],
    do_not_specialize_on_alignment=["evict_ptr", "cu_ptr", "table_ptr", "len_ptr"],
)
def weigh_kernel(
    q_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    scores_ptr: tl.tensor,
    evict_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    ranks_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    scale: tl.tensor,
    soft_cap: tl.tensor,
    table_stride_b: tl.tensor,
    n_protected: tl.tensor,
    sinks: tl.tensor,
    CAPPED: tl.constexpr,
    NEEDS_QUERY: tl.constexpr,
    BY_SCORE: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    SMALLEST: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """One program per (BLOCK_S slots of a sequence, sequence, KV head): each row's weight for each token.

    ``weights_ptr`` is a pool [M, rows, P]. Weight number c of a sequence is stored at its slot c: candidates in the order in
    which they are kept, then the protected tokens.
    """
    b = tl.program_id(1)
    head = tl.program_id(2)
    first_slot = tl.program_id(0) * BLOCK_S
    n = tl.load(len_ptr + b).to(tl.int32)
    if (is_wanted(evict_ptr, cu_ptr, len_ptr, b, n_protected, NEEDS_QUERY) == 0) | (first_slot >= n):
        return
    table_ptr += b * table_stride_b
    n_candidates = n - n_protected
    s = first_slot + tl.arange(0, BLOCK_S)
    inside = s < n
    page = tl.load(table_ptr + s // P, mask=inside, other=0)
    at = (page * K + head) * P + s % P
    rank = tl.load(ranks_ptr + at, mask=inside, other=0)
    is_candidate = (rank >= sinks) & (rank < sinks + n_candidates)
    if BY_SCORE:
        key = ordered_key(tl.load(scores_ptr + at, mask=inside, other=0.0))
        place = tl.zeros([BLOCK_S], tl.int32)
        for start in range(0, n, BLOCK_R):
            r = start + tl.arange(0, BLOCK_R)
            there = (tl.load(table_ptr + r // P, mask=r < n, other=0) * K + head) * P + r % P
            ranks = tl.load(ranks_ptr + there, mask=r < n, other=-1)
            keys = ordered_key(tl.load(scores_ptr + there, mask=r < n, other=0.0))
            counted = (r < n) & (ranks >= sinks) & (ranks < sinks + n_candidates)
            # Less significant than the key, the rank: the lower position first.
            ours = (key - 2147483647) * 4294967296 - rank
            theirs = (keys - 2147483647) * 4294967296 - ranks
            place += tl.sum((counted[None, :] & (theirs[None, :] > ours[:, None])).to(tl.int32), 1)
    else:
        place = sinks + n_candidates - 1 - rank
    protected = n_candidates + tl.where(rank < sinks, rank, rank - n_candidates)
    place = tl.where(is_candidate, place, protected)
    to_page = tl.load(table_ptr + place // P, mask=inside, other=0)
    if NEEDS_QUERY:
        G: tl.constexpr = H // K
        d = tl.arange(0, BLOCK_D)
        row = tl.load(cu_ptr + b + 1) - 1
        k_at = ((at + page * K * P) * D)[:, None] + d[None, :]
        k = tl.load(kv_ptr + k_at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        for g in range(G):
            query = row * H + head * G + g
            q = tl.load(q_ptr + query * D + d, mask=d < D, other=0.0).to(tl.float32)
            logits = tl.sum(k * q[None, :], 1) * scale
            if CAPPED:
                logits = capped(logits, soft_cap)
            weight = tl.exp(logits - tl.load(lse_ptr + query))
            to = (to_page * H + head * G + g) * P + place % P
            tl.store(weights_ptr + to, tl.where(weight >= SMALLEST, weight, 0.0), mask=inside)
    else:
        weight = tl.abs(tl.load(scores_ptr + at, mask=inside, other=0.0))
        to = (to_page * K + head) * P + place % P
        tl.store(weights_ptr + to, tl.where(weight >= SMALLEST, weight, 0.0), mask=inside)


@triton.jit(
    do_not_specialize=["table_stride_b", "n_protected", "n_tiles"],
    do_not_specialize_on_alignment=["evict_ptr", "cu_ptr", "table_ptr", "len_ptr"],
)
def sum_kernel(
    evict_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    n_protected: tl.tensor,
    n_tiles: tl.tensor,
    NEEDS_QUERY: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_C: tl.constexpr,
) -> None:
    """One program per (BLOCK_C candidates of a sequence, sequence, row): the sum of their squares in fp64."""
    tile = tl.program_id(0)
    b = tl.program_id(1)
    row = tl.program_id(2)
    n_candidates = tl.load(len_ptr + b).to(tl.int32) - n_protected
    if (is_wanted(evict_ptr, cu_ptr, len_ptr, b, n_protected, NEEDS_QUERY) == 0) | (tile * BLOCK_C >= n_candidates):
        return
    c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    page = tl.load(table_ptr + b * table_stride_b + c // P, mask=c < n_candidates, other=0)
    weight = tl.load(weights_ptr + (page * R + row) * P + c % P, mask=c < n_candidates, other=0.0).to(tl.float64)
    tl.store(sums_ptr + (b.to(tl.int64) * n_tiles + tile) * R + row, tl.sum(weight * weight, 0))


@triton.jit
def norm_sum(squares: tl.tensor) -> tl.tensor:
    """The sum over rows of the square roots."""
    return tl.sum(tl.sqrt(squares), 0)


@triton.jit(
    do_not_specialize=["table_stride_b", "n_protected", "n_tiles"],
    do_not_specialize_on_alignment=["evict_ptr", "cu_ptr", "table_ptr", "len_ptr", "budget_ptr"],
)
def cut_kernel(
    evict_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    budget_ptr: tl.tensor,
    threshold: tl.tensor,
    table_stride_b: tl.tensor,
    n_protected: tl.tensor,
    n_tiles: tl.tensor,
    NEEDS_QUERY: tl.constexpr,
    PROTECTED: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """One program per sequence: the smallest number of candidates with the required norm, by tile, then within the tile."""
    b = tl.program_id(0)
    n = tl.load(len_ptr + b)
    if is_wanted(evict_ptr, cu_ptr, len_ptr, b, n_protected, NEEDS_QUERY) == 0:
        tl.store(budget_ptr + b, n)
        return
    table_ptr += b * table_stride_b
    sums_ptr += b.to(tl.int64) * n_tiles * R
    n_candidates = n.to(tl.int32) - n_protected
    rows = tl.arange(0, BLOCK_ROWS)
    steps = tl.arange(0, STEP)
    base = tl.zeros([BLOCK_ROWS], tl.float64)
    if PROTECTED:
        for start in range(n_candidates, n_candidates + n_protected, STEP):
            c = start + steps
            mask = (rows < R)[:, None] & (c < n)[None, :]
            page = tl.load(table_ptr + c // P, mask=c < n, other=0)
            at = (page[None, :] * R + rows[:, None]) * P + (c % P)[None, :]
            weight = tl.load(weights_ptr + at, mask=mask, other=0.0).to(tl.float64)
            base += tl.sum(weight * weight, 1)
    total = base
    for tile in range(tl.cdiv(n_candidates, BLOCK_C)):
        total += tl.load(sums_ptr + tile * R + rows, mask=rows < R, other=0.0)
    lost = (tl.zeros([], tl.float32) + threshold).to(tl.float64)
    needed = (1.0 - lost) * norm_sum(total)

    short = tl.zeros([], tl.int32)
    squares = base
    reached = base
    for tile in range(tl.cdiv(n_candidates, BLOCK_C)):
        squares += tl.load(sums_ptr + tile * R + rows, mask=rows < R, other=0.0)
        is_short = norm_sum(squares) < needed
        reached = tl.where(is_short, squares, reached)
        short += is_short.to(tl.int32)
    n_short = (norm_sum(base) < needed).to(tl.int32) + short * BLOCK_C
    end = tl.minimum(short * BLOCK_C + BLOCK_C, n_candidates)
    for start in range(short * BLOCK_C, end, STEP):
        c = start + steps
        mask = (rows < R)[:, None] & (c < end)[None, :]
        page = tl.load(table_ptr + c // P, mask=c < end, other=0)
        at = (page[None, :] * R + rows[:, None]) * P + (c % P)[None, :]
        weight = tl.load(weights_ptr + at, mask=mask, other=0.0).to(tl.float64)
        norms = norm_sum(reached[:, None] + tl.cumsum(weight * weight, 1))
        n_short += tl.sum(((norms < needed) & (c < end)).to(tl.int32), 0)
        reached += tl.sum(weight * weight, 1)
    tl.store(budget_ptr + b, (n_protected + tl.minimum(n_short, n_candidates)).to(tl.int64))


def run(args: Arguments[Tensor]) -> tuple[Tensor]:
    """Spec: ``spec.py``. Returns (budget [B],). Products q.k and weights are fp32, their squares and all sums fp64.

    Launches on the current stream and does not wait. Temporary memory: 4 bytes per slot and row, and 4 per slot and KV head,
    which is (H + K) / (K D) of the size of half-precision keys and values. Positions must be below 2**31.
    """
    n_pages, _, n_kv_heads, _, head_size = args.kv.shape
    n_heads, device = args.q.shape[1], args.kv.device
    table_BT, len_B = args.page_table[args.layer], args.kv_len[args.layer]
    n_sequences, n_slots = len(table_BT), table_BT.shape[1] * args.page_size
    n_rows = n_heads if args.row == 0 else n_kv_heads
    n_tiles = -(-n_slots // _TILE_PLACES)
    ranks = torch.empty(args.token_positions.shape, dtype=torch.int32, device=device)
    weights = torch.empty((n_pages, n_rows, args.page_size), dtype=torch.float32, device=device)
    sums = torch.empty((n_sequences, n_tiles, n_rows), dtype=torch.float64, device=device)
    budget = torch.empty_like(len_B)
    step: dict[str, Any] = {
        "evict_ptr": args.evict,
        "cu_ptr": args.cu_tokens,
        "table_ptr": table_BT,
        "len_ptr": len_B,
        "table_stride_b": table_BT.stride(0),
        "n_protected": args.sinks + args.recent,
        "NEEDS_QUERY": int(args.row == 0),
        "P": args.page_size,
    }
    tiles = (-(-n_slots // 64), n_sequences, n_kv_heads)
    sizes = {"K": n_kv_heads, "BLOCK_S": 64, "BLOCK_R": 128}
    launch(order_kernel, tiles, warps=8, token_positions_ptr=args.token_positions, ranks_ptr=ranks, **step, **sizes)
    launch(
        weigh_kernel,
        tiles,
        warps=8,
        q_ptr=args.q.contiguous(),
        lse_ptr=args.lse,
        kv_ptr=args.kv,
        # Without scores nothing reads them.
        scores_ptr=args.lse if args.scores is None else args.scores,
        ranks_ptr=ranks,
        weights_ptr=weights,
        scale=args.scale,
        soft_cap=float(args.soft_cap),
        sinks=args.sinks,
        CAPPED=int(args.soft_cap > 0),
        BY_SCORE=int(args.ranking == 0),
        H=n_heads,
        D=head_size,
        SMALLEST=NO_WEIGHT,
        BLOCK_D=power_of_2(head_size),
        **step,
        **sizes,
    )
    cut: dict[str, Any] = {"weights_ptr": weights, "sums_ptr": sums, "n_tiles": n_tiles, "R": n_rows, "BLOCK_C": _TILE_PLACES}
    launch(sum_kernel, (n_tiles, n_sequences, n_rows), **step, **cut)
    launch(
        cut_kernel,
        (n_sequences,),
        warps=8,
        budget_ptr=budget,
        threshold=float(args.threshold),
        PROTECTED=args.protected_in_norm,
        BLOCK_ROWS=power_of_2(n_rows),
        STEP=32,
        **step,
        **cut,
    )
    return (budget,)
