"""RecallAttention on the GPU: summaries of filled pages, a choice of pages per KV head, attention over a page table per head.

Each part can be called alone, for pools that are kept elsewhere. K KV heads, P page size, D head size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from trt_kv.plugins.attention_kernels import sequence_of_tile
from trt_kv.plugins.attention_triton import append_tokens, attend_chunks, attend_one
from trt_kv.plugins.recall_attention.arguments import Arguments
from trt_kv.plugins.recall_attention.bounds_triton import coded_again
from trt_kv.plugins.recall_attention.choice_triton import PageCounts, choose_pages, drifted, page_counts
from trt_kv.plugins.recall_attention.code_kernels import smallest_and_largest, write_codes
from trt_kv.plugins.recall_attention.page_counts import CODES, DEVIATION, PageLimits
from trt_kv.plugins.triton_launch import launch, power_of_2


@triton.jit
def summarise(
    keys_ptr: tl.tensor,
    to_ptr: tl.tensor,
    P: tl.constexpr,
    D: tl.constexpr,
    DEVIATION: tl.constexpr,
    CODED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """Write the lower and upper bounds [2, D] of one KV head's keys [P, D] in a page, and behind them their codes if CODED."""
    d = tl.arange(0, BLOCK_D)
    lo, hi = smallest_and_largest(keys_ptr, P, D, BLOCK_D, BLOCK_P)
    if CODED:
        write_codes(keys_ptr, to_ptr + 2 * D, lo, hi, P, D, BLOCK_D)
    if DEVIATION:
        middle = (lo + hi) / 2
        deviation = tl.zeros([BLOCK_D], tl.float32)
        for start in range(0, P, BLOCK_P):
            p = start + tl.arange(0, BLOCK_P)
            mask = (p < P)[:, None] & (d < D)[None, :]
            k = tl.load(keys_ptr + p[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
            deviation += tl.sum(tl.where(mask, tl.abs(k - middle[None, :]), 0.0), 0)
        lo = middle - deviation / P
        hi = middle + deviation / P
    tl.store(to_ptr + d, lo.to(to_ptr.dtype.element_ty), mask=d < D)
    tl.store(to_ptr + D + d, hi.to(to_ptr.dtype.element_ty), mask=d < D)


@triton.jit(
    do_not_specialize=["table_stride_b", "n_sequences"], do_not_specialize_on_alignment=["cu_ptr", "table_ptr", "len_ptr"]
)
def summary_kernel(
    cu_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    summaries_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    n_sequences: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    DEVIATION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """One program per (page that a sequence may have filled in this step, KV head)."""
    tile = tl.program_id(0)
    head = tl.program_id(1)
    b = sequence_of_tile(cu_ptr, tile, n_sequences, P)
    begin = tl.load(cu_ptr + b)
    n = tl.load(len_ptr + b)
    n_new = tl.load(cu_ptr + b + 1) - begin
    j = (n - n_new) // P + (tile - begin // P - b)
    if j >= n // P:
        return
    page = tl.load(table_ptr + b * table_stride_b + j)
    keys_ptr, to_ptr = kv_ptr + (page * 2 * K + head) * P * D, summaries_ptr + (page * K + head) * ROWS * D
    summarise(keys_ptr, to_ptr, P, D, DEVIATION, ROWS > 2, BLOCK_D, BLOCK_P)


@triton.jit(
    do_not_specialize=["table_stride_b", "n_table", "sink_pages"],
    do_not_specialize_on_alignment=["table_ptr", "len_ptr", "n_chosen_ptr", "attended_ptr"],
)
def table_kernel(
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    n_chosen_ptr: tl.tensor,
    attended_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    head_table_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    n_table: tl.tensor,
    sink_pages: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """One program per (sequence, KV head): the pages it attends to, sinks, chosen ones and the newest, in order."""
    b = tl.program_id(0)
    row = b.to(tl.int64) * K + tl.program_id(1)
    n_pages = tl.cdiv(tl.load(len_ptr + b), P).to(tl.int32)
    n_attended = tl.cdiv(tl.load(attended_ptr + b), P).to(tl.int32)
    n_chosen = tl.load(n_chosen_ptr + b).to(tl.int32)
    for start in range(0, n_attended, BLOCK_J):
        i = start + tl.arange(0, BLOCK_J)
        is_chosen = (i >= sink_pages) & (i < sink_pages + n_chosen)
        chosen = tl.load(chosen_ptr + row * n_table + i - sink_pages, mask=is_chosen, other=0)
        others = tl.where(i < sink_pages, i, n_pages - n_attended + i)
        page = tl.load(table_ptr + b * table_stride_b + tl.where(is_chosen, chosen, others), mask=i < n_attended, other=0)
        tl.store(head_table_ptr + row * n_table + i, page, mask=i < n_attended)


def run(args: Arguments[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Spec: ``spec.py``. Returns (out [N, H, D], lse [N, H], corrected [B, K]); updates the states in place.

    Launches on the current stream and does not wait. Output rows after the last sequence's are left uninitialised.
    """
    append_tokens(args.kv, args.token_positions, args.slots[args.layer], args.k, args.v, args.positions)

    q = args.q.contiguous()
    table_BT, len_B = args.page_table[args.layer], args.kv_len[args.layer]
    limits = PageLimits(page_size=args.page_size, sinks=args.sinks, recent=args.recent)
    summaries_of_filled(args.kv, args.summaries, args.cu_tokens, table_BT, len_B, len(q), args.summary)
    corrected_BK, probe_BHD = drifted(
        q, args.cu_tokens, args.prompt_remaining, args.query_rows[args.layer], args.last_query, args.kv.shape[2], args.tau
    )
    counts, prompt_B = page_counts(
        args.cu_tokens,
        args.prompt_remaining,
        len_B,
        args.prompt_len,
        args.adaptive_budget[args.layer],
        limits,
        args.kept_share,
        args.kept_tokens,
    )
    wanted_BK = counts.chosen[:, None].expand(corrected_BK.shape)
    summaries = args.summaries
    if args.summary == CODES and summaries.shape[2] == 2:
        summaries = coded_again(args.kv, summaries, table_BT, len_B)
    chosen_BKT = choose_pages(
        probe_BHD, summaries, table_BT, counts.between, wanted_BK, limits.n_sinks, args.pooling, args.softmax_scale
    )

    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    attend_chosen(
        *(q, args.cu_tokens, table_BT, len_B, args.kv, counts, chosen_BKT, limits.n_sinks, args.scale, args.soft_cap),
        *(out, lse),
    )
    attend_chunks(
        *(q, args.positions, args.cu_tokens, table_BT, prompt_B, args.kv, args.token_positions, args.scale, out, lse),
        min_new=1,
        soft_cap=args.soft_cap,
    )
    return out, lse, corrected_BK


def summaries_of_filled(
    kv: Tensor, summaries: Tensor, cu_tokens: Tensor, table_BT: Tensor, kv_len_B: Tensor, n_tokens: int, summary: int
) -> None:
    """Write the summaries of the pages that the last of this step's ``n_tokens`` tokens, already in ``kv``, have filled.

    ``summaries`` [M, K, R, D] with more than two rows get codes, too.
    """
    n_kv_heads, page_size, head_size = kv.shape[2:]
    launch(
        summary_kernel,
        (n_tokens // page_size + len(kv_len_B), n_kv_heads),
        warps=1,  # as in begin_kernel, which computes the same sums in the same order
        cu_ptr=cu_tokens,
        table_ptr=table_BT,
        len_ptr=kv_len_B,
        kv_ptr=kv,
        summaries_ptr=summaries,
        table_stride_b=table_BT.stride(0),
        n_sequences=len(kv_len_B),
        K=n_kv_heads,
        P=page_size,
        D=head_size,
        ROWS=summaries.shape[2],
        DEVIATION=int(summary == DEVIATION),
        BLOCK_D=power_of_2(head_size),
        BLOCK_P=min(32, power_of_2(page_size)),
    )


def attend_chosen(
    q_NHD: Tensor,
    cu_tokens: Tensor,
    table_BT: Tensor,
    kv_len_B: Tensor,
    kv: Tensor,
    counts: PageCounts,
    chosen_BKT: Tensor,
    n_sinks: int,
    scale: float,
    soft_cap: float,
    out: Tensor,
    lse: Tensor,
) -> None:
    """The query of each generated token attends to the sinks, the newest pages and the pages that its KV head has chosen."""
    n_sequences, n_kv_heads, n_table = chosen_BKT.shape
    head_table_BKT = torch.empty_like(chosen_BKT)
    launch(
        table_kernel,
        (n_sequences, n_kv_heads),
        table_ptr=table_BT,
        len_ptr=kv_len_B,
        n_chosen_ptr=counts.chosen,
        attended_ptr=counts.attended,
        chosen_ptr=chosen_BKT,
        head_table_ptr=head_table_BKT,
        table_stride_b=table_BT.stride(0),
        n_table=n_table,
        sink_pages=n_sinks,
        K=n_kv_heads,
        P=kv.shape[3],
        BLOCK_J=128,
    )
    attend_one(q_NHD, cu_tokens, head_table_BKT, counts.attended, kv, scale, out, lse, soft_cap=soft_cap)
