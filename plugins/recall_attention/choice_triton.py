"""Which pages a KV head chooses, and when its choice is corrected, on the GPU: lengths, counts and choices stay on the device.

The counterpart of ``choice.py``. H query heads, K KV heads, G = H / K, P page size, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from trt_kv.plugins.recall_attention.bounds_triton import page_bounds
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.plugins.recall_attention.rank_kernels import choose_kernel
from trt_kv.plugins.shares_triton import kept_of_share
from trt_kv.plugins.triton_launch import launch, power_of_2

CHOICE_WARPS = 8
"""Few programs with many warps, because ranking is on the critical path of a step."""
_FEW_PAGES = 1024
_MOST_PAGES, _MOST_VALUES = 4096, 16384
"""Limits for ranking in registers, 64 numbers per thread; more than ``_MOST_PAGES`` are ranked in tiles of ``_FEW_PAGES``."""


@triton.jit
def counted(
    is_generated: tl.tensor,
    n: tl.tensor,
    prompt_len: tl.tensor,
    budget: tl.tensor,
    kept_share: tl.tensor,
    kept_tokens: tl.tensor,
    sink_pages: tl.tensor,
    newest_pages: tl.tensor,
    recent: tl.tensor,
    P: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Pages between sinks and newest of a sequence of ``n`` tokens, those chosen of them, tokens attended to; else zeros.

    ``budget``: the adaptive budget of the sequence in tokens; if negative, share and tokens apply.
    """
    budget = tl.where(budget >= 0, budget, kept_of_share(prompt_len, kept_share) + kept_tokens)
    n_pages = tl.cdiv(n, P)
    first_newest = tl.maximum(n - recent, 0) // P
    between = tl.maximum(first_newest - sink_pages, 0)
    chosen = tl.minimum(tl.maximum(budget // P - sink_pages - newest_pages, 0), between)
    sinks = tl.minimum(n_pages, sink_pages)
    pages = sinks + chosen + n_pages - tl.maximum(first_newest, sinks)
    attended = n - (n_pages - pages) * P
    return tl.where(is_generated, between, 0), tl.where(is_generated, chosen, 0), tl.where(is_generated, attended, 0)


@triton.jit
def is_steady_query(x: tl.tensor, y: tl.tensor, in_group: tl.tensor, tau: tl.tensor, G: tl.constexpr) -> tl.tensor:
    """Whether the mean cosine of a group's queries, rows of ``x`` and ``y`` in fp32, is at least tau; false if it is NaN."""
    norms = tl.sqrt(tl.sum(x * x, 1)) * tl.sqrt(tl.sum(y * y, 1))
    has_angle = norms > 0
    cosines = tl.where(has_angle, tl.sum(x * y, 1) / tl.where(has_angle, norms, 1.0), 0.0)
    n_angles = tl.sum((has_angle & in_group).to(tl.int32), 0)
    return (tl.sum(cosines, 0) / G >= tau) & (n_angles == G)


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
    between, chosen, attended = counted(
        is_generated, n, prompt_len, budget, kept_share, kept_tokens, sink_pages, newest_pages, recent, P
    )
    tl.store(between_ptr + b, between)
    tl.store(chosen_ptr + b, chosen)
    tl.store(attended_ptr + b, attended)
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
    is_steady = is_steady_query(q.to(tl.float32), before.to(tl.float32), g < G, tau, G)
    is_generated = tl.load(remaining_ptr + end - 1) < 0
    tl.store(corrected_ptr + b * K + head, (is_generated & (is_steady == 0)).to(tl.int64))
    tl.store(probe_ptr + b.to(tl.int64) * H * D + at, tl.where(is_steady, before, q), mask=mask)
    # A thread may store elements that another one loads: all loads must be done first.
    tl.debug_barrier()
    tl.store(before_ptr + at, q, mask=mask)


@dataclass(frozen=True, kw_only=True)
class PageCounts:
    """Pages to choose from and to choose, all [B] int64; zeros for sequences without a generated token in this step."""

    between: Tensor
    """Pages between sinks and newest."""
    chosen: Tensor
    """Number of them that each KV head chooses."""
    attended: Tensor
    """Tokens that each KV head attends to: those in sinks, chosen pages and the newest."""


def drifted(
    q_NHD: Tensor,
    cu_tokens: Tensor,
    prompt_remaining_N: Tensor,
    query_rows_B: Tensor,
    last_query: Tensor,
    n_kv_heads: int,
    tau: float,
) -> tuple[Tensor, Tensor]:
    """Compare each sequence's last query of this step with the one before, and store it in ``last_query`` [U, H, D].

    Returns [B, K] int64, 1 where a generated token's KV head is corrected, else 0; and the queries that pages are ranked for,
    [B, H, D], undefined for a sequence without a token in this step.
    """
    n_sequences, (n_heads, head_size) = len(query_rows_B), q_NHD.shape[1:]
    corrected_BK = torch.empty((n_sequences, n_kv_heads), dtype=torch.int64, device=q_NHD.device)
    probe_BHD = torch.empty((n_sequences, n_heads, head_size), dtype=q_NHD.dtype, device=q_NHD.device)
    launch(
        drift_kernel,
        (n_sequences, n_kv_heads),
        warps=1,  # as in begin_kernel, which computes the same sums in the same order
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
    adaptive_budget_B: Tensor,
    limits: PageLimits,
    kept_share: float,
    kept_tokens: int,
) -> tuple[PageCounts, Tensor]:
    """The budgets in pages, for every sequence of a step; and the number of cached tokens of sequences that prefill in this
    step, [B] int64, else 0.
    """
    between, chosen, attended, prompt = torch.empty((4, len(kv_len_B)), dtype=torch.int64, device=kv_len_B.device)
    launch(
        count_kernel,
        (len(kv_len_B),),
        warps=1,
        cu_ptr=cu_tokens,
        remaining_ptr=prompt_remaining_N,
        len_ptr=kv_len_B,
        prompt_len_ptr=prompt_len_B,
        found_ptr=adaptive_budget_B,
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
    return PageCounts(between=between, chosen=chosen, attended=attended), prompt


def choose_pages(
    probe_BHD: Tensor,
    summaries: Tensor,
    table_BT: Tensor,
    between_B: Tensor,
    wanted_BK: Tensor,
    n_sinks: int,
    pooling: int,
    softmax_scale: float,
) -> Tensor:
    """The ``wanted_BK`` best of the ``between_B`` pages after ``n_sinks`` for the queries ``probe_BHD``, as ascending page
    indices within the sequence: [B, K, T] int64, of which the first ``wanted_BK[b, k]`` of a row are defined.

    ``summaries`` [M, K, R, D] are read through ``table_BT``. ``wanted_BK`` may have expanded axes.
    """
    chosen_BKT = torch.empty((*wanted_BK.shape, table_BT.shape[1]), dtype=torch.int64, device=summaries.device)
    bounds_BHT = page_bounds(probe_BHD, summaries, table_BT, between_B, wanted_BK, n_sinks)
    launch(
        choose_kernel,
        tuple(wanted_BK.shape),
        warps=CHOICE_WARPS,
        between_ptr=between_B,
        wanted_ptr=wanted_BK,
        wanted_stride_b=wanted_BK.stride(0),
        wanted_stride_k=wanted_BK.stride(1),
        sink_pages=n_sinks,
        **choice_arguments(bounds_BHT, chosen_BKT, pooling, softmax_scale),
    )
    return chosen_BKT


def choice_arguments(bounds_BHT: Tensor, chosen_BKT: Tensor, pooling: int, softmax_scale: float) -> dict[str, Any]:
    """Arguments of a kernel that chooses, besides the page counts."""
    n_kv_heads, n_table = chosen_BKT.shape[1:]
    n_heads = bounds_BHT.shape[1]
    block_g = power_of_2(n_heads // n_kv_heads)
    return {
        "bounds_ptr": bounds_BHT,
        "keys_ptr": torch.empty_like(chosen_BKT),
        "chosen_ptr": chosen_BKT,
        "softmax_scale": float(softmax_scale),
        "n_table": n_table,
        "H": n_heads,
        "K": n_kv_heads,
        "SOFTMAX": int(pooling < 2),
        "MAXIMUM": pooling % 2,
        "BLOCK_G": block_g,
        "FEW": _FEW_PAGES,
        "MANY": max(_FEW_PAGES, min(_MOST_PAGES, _MOST_VALUES // block_g)),
    }
