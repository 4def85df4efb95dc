"""Which pages a KV head chooses, and when it must choose anew, on the GPU: lengths, counts and choices stay on the device.

``choice.py`` says the same for the CPU.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from trt_kv.plugins.ranking_triton import extended, next_bytes, ordered_key
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.plugins.shares_triton import kept_of_share
from trt_kv.plugins.triton_launch import launch, power_of_2

_BOUND_PAGES = 32
_TILE_PAGES = 512


@dataclass(frozen=True, kw_only=True)
class PageCounts:
    """What each sequence may choose from, all [B] int64; zeros where it has no generated token in this step."""

    between: Tensor
    """Pages between sinks and newest."""
    chosen: Tensor
    """How many of them each KV head chooses."""
    attended: Tensor
    """Tokens that each KV head attends to: those in sinks, chosen pages and the newest."""
    prompt: Tensor
    """Cached tokens of a sequence whose tokens in this step are of its prompt, else 0."""


@triton.jit(
    do_not_specialize=["kept_tokens", "sink_pages", "newest_pages", "recent"],
    do_not_specialize_on_alignment=[
        *("cu_ptr", "remaining_ptr", "len_ptr", "prompt_len_ptr", "found_ptr"),
        *("between_ptr", "chosen_ptr", "attended_ptr", "prompt_ptr"),
    ],
)
def count_kernel(
    cu_ptr: tl.tensor,
    remaining_ptr: tl.tensor,
    len_ptr: tl.tensor,
    prompt_len_ptr: tl.tensor,
    found_ptr: tl.tensor,
    between_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    attended_ptr: tl.tensor,
    prompt_ptr: tl.tensor,
    kept_share: tl.tensor,
    kept_tokens: tl.tensor,
    sink_pages: tl.tensor,
    newest_pages: tl.tensor,
    recent: tl.tensor,
    P: tl.constexpr,
) -> None:
    """One program per sequence."""
    b = tl.program_id(0)
    begin = tl.load(cu_ptr + b)
    end = tl.load(cu_ptr + b + 1)
    is_there = end > begin
    is_generated = is_there & (tl.load(remaining_ptr + end - 1, mask=is_there, other=0) < 0)
    n = tl.load(len_ptr + b)
    prompt_len = tl.load(prompt_len_ptr + b)
    budget = tl.load(found_ptr + b)
    budget = tl.where(budget >= 0, budget, kept_of_share(prompt_len, kept_share) + kept_tokens)
    n_pages = tl.cdiv(n, P)
    first_newest = tl.maximum(n - recent, 0) // P
    between = tl.maximum(first_newest - sink_pages, 0)
    chosen = tl.minimum(tl.maximum(budget // P - sink_pages - newest_pages, 0), between)
    sinks = tl.minimum(n_pages, sink_pages)
    pages = sinks + chosen + n_pages - tl.maximum(first_newest, sinks)
    tl.store(between_ptr + b, tl.where(is_generated, between, 0))
    tl.store(chosen_ptr + b, tl.where(is_generated, chosen, 0))
    tl.store(attended_ptr + b, tl.where(is_generated, n - (n_pages - pages) * P, 0))
    tl.store(prompt_ptr + b, tl.where(is_there & (is_generated == 0), n, 0))


@triton.jit(do_not_specialize_on_alignment=["cu_ptr", "remaining_ptr", "rows_ptr"])
def drift_kernel(
    q_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    remaining_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    last_query_ptr: tl.tensor,
    probe_ptr: tl.tensor,
    corrected_ptr: tl.tensor,
    tau: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
) -> None:
    """One program per (sequence, KV head)."""
    b = tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(cu_ptr + b)
    end = tl.load(cu_ptr + b + 1)
    if end == begin:
        tl.store(corrected_ptr + b * K + head, tl.zeros([], tl.int64))
        return
    G: tl.constexpr = H // K
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, BLOCK_D)
    mask = (g < G)[:, None] & (d < D)[None, :]
    at = (head * G + g[:, None]) * D + d[None, :]
    before_ptr = last_query_ptr + tl.load(rows_ptr + b) * H * D
    q = tl.load(q_ptr + (end - 1) * H * D + at, mask=mask, other=0.0)
    before = tl.load(before_ptr + at, mask=mask, other=0.0)
    x = q.to(tl.float32)
    y = before.to(tl.float32)
    norms = tl.sqrt(tl.sum(x * x, 1)) * tl.sqrt(tl.sum(y * y, 1))
    has_angle = norms > 0
    cosines = tl.where(has_angle, tl.sum(x * y, 1) / tl.where(has_angle, norms, 1.0), 0.0)
    n_angles = tl.sum((has_angle & (g < G)).to(tl.int32), 0)
    is_steady = (tl.sum(cosines, 0) / G >= tau) & (n_angles == G)
    is_generated = tl.load(remaining_ptr + end - 1) < 0
    tl.store(corrected_ptr + b * K + head, (is_generated & (is_steady == 0)).to(tl.int64))
    tl.store(probe_ptr + b.to(tl.int64) * H * D + at, tl.where(is_steady, before, q), mask=mask)
    # Whatever thread holds an element: nothing is overwritten that is still to be read.
    tl.debug_barrier()
    tl.store(before_ptr + at, q, mask=mask)


@triton.jit(
    do_not_specialize=["table_stride_b", "n_table", "sink_pages"],
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
    n_table: tl.tensor,
    sink_pages: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """One program per (BLOCK_J pages between sinks and newest, sequence, KV head): summaries are read once for the group."""
    b = tl.program_id(1)
    head = tl.program_id(2)
    start = tl.program_id(0) * BLOCK_J
    n = tl.load(between_ptr + b).to(tl.int32)
    wanted = tl.load(wanted_ptr + b).to(tl.int32)
    if (start >= n) | (wanted == 0) | (wanted == n):
        return
    G: tl.constexpr = H // K
    j = start + tl.arange(0, BLOCK_J)
    d = tl.arange(0, BLOCK_D)
    page = tl.load(table_ptr + b * table_stride_b + sink_pages + j, mask=j < n, other=0)
    at = (page * K + head)[:, None] * 2 * D + d[None, :]
    mask = (j < n)[:, None] & (d < D)[None, :]
    lo = tl.load(summaries_ptr + at, mask=mask, other=0.0).to(tl.float32)
    hi = tl.load(summaries_ptr + at + D, mask=mask, other=0.0).to(tl.float32)
    for g in range(G):
        query = b.to(tl.int64) * H + head * G + g
        x = tl.load(probe_ptr + query * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
        tl.store(bounds_ptr + query * n_table + j, tl.sum(tl.maximum(x * lo, x * hi), 1), mask=j < n)


@triton.jit(do_not_specialize=["n_table", "sink_pages"], do_not_specialize_on_alignment=["between_ptr", "wanted_ptr"])
def choose_kernel(
    bounds_ptr: tl.tensor,
    between_ptr: tl.tensor,
    wanted_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    softmax_scale: tl.tensor,
    n_table: tl.tensor,
    sink_pages: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MAXIMUM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """One program per (sequence, KV head): one value per page, the least value that is chosen, the pages in order."""
    b = tl.program_id(0)
    head = tl.program_id(1)
    n = tl.load(between_ptr + b).to(tl.int32)
    wanted = tl.load(wanted_ptr + b).to(tl.int32)
    if wanted == 0:
        return
    row = b.to(tl.int64) * K + head
    keys_ptr += row * n_table
    chosen_ptr += row * n_table
    tile = tl.arange(0, BLOCK_J)
    if wanted == n:
        for start in range(0, n, BLOCK_J):
            tl.store(chosen_ptr + start + tile, (sink_pages + start + tile).to(tl.int64), mask=start + tile < n)
        return
    G: tl.constexpr = H // K
    g = tl.arange(0, BLOCK_G)
    bounds_ptr += (row * G + g[:, None]) * n_table
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
        if MAXIMUM:
            pooled = tl.max(tl.where(mask, values, float("-inf")), 0)
        else:
            pooled = tl.sum(tl.where(mask, values, 0.0), 0)
        tl.store(keys_ptr + start + tile, ordered_key(pooled), mask=start + tile < n)
    # Keys are read by other threads than wrote them.
    tl.debug_barrier()

    least = tl.zeros([], tl.int64)
    for nth in range(4):
        histogram = tl.zeros([256], tl.int32)
        for start in range(0, n, BLOCK_J):
            keys = tl.load(keys_ptr + start + tile, mask=start + tile < n, other=0)
            histogram += next_bytes(keys, start + tile < n, least, nth)
        least, wanted, _ = extended(least, wanted, histogram)

    # All above the least value, and the first ones that are equal to it.
    n_before = 0
    for start in range(0, n, BLOCK_J):
        keys = tl.load(keys_ptr + start + tile, mask=start + tile < n, other=-1)
        is_equal = (keys == least).to(tl.int32)
        is_in = ((keys > least) | ((is_equal == 1) & (tl.cumsum(is_equal) <= wanted))).to(tl.int32)
        to = n_before + tl.cumsum(is_in) - 1
        tl.store(chosen_ptr + to, (sink_pages + start + tile).to(tl.int64), mask=is_in == 1)
        n_before += tl.sum(is_in, 0)
        wanted -= tl.sum(is_equal, 0)


def drifted(
    q_NHD: Tensor,
    cu_tokens: Tensor,
    prompt_remaining_N: Tensor,
    query_rows_B: Tensor,
    last_query: Tensor,
    n_kv_heads: int,
    tau: float,
) -> tuple[Tensor, Tensor]:
    """Compare each sequence's last query of this step with the one before, and remember it in ``last_query`` [U, H, D].

    Returns 1 where a generated token's KV head is corrected, else 0, [B, K] int64; and the queries that pages are ranked for,
    [B, H, D], undefined for a sequence without a token in this step.
    """
    n_sequences, (n_heads, head_size) = len(query_rows_B), q_NHD.shape[1:]
    corrected_BK = torch.empty((n_sequences, n_kv_heads), dtype=torch.int64, device=q_NHD.device)
    probe_BHD = torch.empty((n_sequences, n_heads, head_size), dtype=q_NHD.dtype, device=q_NHD.device)
    launch(
        drift_kernel,
        (n_sequences, n_kv_heads),
        q_ptr=q_NHD,
        cu_ptr=cu_tokens,
        remaining_ptr=prompt_remaining_N,
        rows_ptr=query_rows_B,
        last_query_ptr=last_query,
        probe_ptr=probe_BHD,
        corrected_ptr=corrected_BK,
        tau=float(tau),
        H=n_heads,
        K=n_kv_heads,
        D=head_size,
        BLOCK_D=power_of_2(head_size),
        BLOCK_G=power_of_2(n_heads // n_kv_heads),
    )
    return corrected_BK, probe_BHD


def page_counts(
    cu_tokens: Tensor,
    prompt_remaining_N: Tensor,
    kv_len_B: Tensor,
    prompt_len_B: Tensor,
    found_budget_B: Tensor,
    limits: PageLimits,
    kept_share: float,
    kept_tokens: int,
) -> PageCounts:
    """What the budgets mean in pages, for every sequence of a step."""
    between, chosen, attended, prompt = torch.empty((4, len(kv_len_B)), dtype=torch.int64, device=kv_len_B.device)
    launch(
        count_kernel,
        (len(kv_len_B),),
        warps=1,
        cu_ptr=cu_tokens,
        remaining_ptr=prompt_remaining_N,
        len_ptr=kv_len_B,
        prompt_len_ptr=prompt_len_B,
        found_ptr=found_budget_B,
        between_ptr=between,
        chosen_ptr=chosen,
        attended_ptr=attended,
        prompt_ptr=prompt,
        kept_share=float(kept_share),
        kept_tokens=kept_tokens,
        sink_pages=limits.n_sinks,
        newest_pages=limits.n_newest,
        recent=limits.recent,
        P=limits.page_size,
    )
    return PageCounts(between=between, chosen=chosen, attended=attended, prompt=prompt)


def choose_pages(
    probe_BHD: Tensor, summaries: Tensor, table_BT: Tensor, counts: PageCounts, n_sinks: int, pooling: int, softmax_scale: float
) -> Tensor:
    """The best pages of each KV head for the queries ``probe_BHD``, as numbers in the sequence, ascending: [B, K, T] int64.

    The first ``counts.chosen[b]`` of a row are defined. ``summaries`` [M, K, 2, D] are read through ``table_BT``.
    """
    n_sequences, n_heads, head_size = probe_BHD.shape
    n_kv_heads, n_table, device = summaries.shape[1], table_BT.shape[1], summaries.device
    bounds_BHT = torch.empty((n_sequences, n_heads, n_table), dtype=torch.float32, device=device)
    keys_BKT = torch.empty((n_sequences, n_kv_heads, n_table), dtype=torch.int64, device=device)
    chosen_BKT = torch.empty((n_sequences, n_kv_heads, n_table), dtype=torch.int64, device=device)
    launch(
        bound_kernel,
        (-(-n_table // _BOUND_PAGES), n_sequences, n_kv_heads),
        probe_ptr=probe_BHD,
        summaries_ptr=summaries,
        table_ptr=table_BT,
        between_ptr=counts.between,
        wanted_ptr=counts.chosen,
        bounds_ptr=bounds_BHT,
        table_stride_b=table_BT.stride(0),
        n_table=n_table,
        sink_pages=n_sinks,
        H=n_heads,
        K=n_kv_heads,
        D=head_size,
        BLOCK_D=power_of_2(head_size),
        BLOCK_J=_BOUND_PAGES,
    )
    launch(
        choose_kernel,
        (n_sequences, n_kv_heads),
        bounds_ptr=bounds_BHT,
        between_ptr=counts.between,
        wanted_ptr=counts.chosen,
        keys_ptr=keys_BKT,
        chosen_ptr=chosen_BKT,
        softmax_scale=float(softmax_scale),
        n_table=n_table,
        sink_pages=n_sinks,
        H=n_heads,
        K=n_kv_heads,
        SOFTMAX=int(pooling < 2),
        MAXIMUM=pooling % 2,
        BLOCK_G=power_of_2(n_heads // n_kv_heads),
        BLOCK_J=_TILE_PAGES,
    )
    return chosen_BKT
