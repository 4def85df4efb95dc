"""The first kernel of a layer that recalls: stores the new token, tests drift and counts pages, before any are chosen.

H query heads, K KV heads, G = H / K, D head size, P page size, N tokens, B sequences, T pages of a page table.
"""

from dataclasses import dataclass
from typing import Self

import torch
import triton
import triton.language as tl
from torch import Tensor

from trt_kv.plugins.recall_attention.arguments import Arguments
from trt_kv.plugins.recall_attention.choice_triton import PageCounts, counted, is_steady_query
from trt_kv.plugins.recall_attention.page_counts import DEVIATION, PageLimits
from trt_kv.plugins.recall_attention.triton import summarise
from trt_kv.plugins.triton_launch import launch, power_of_2
from trt_kv.runtime.backends.cuda.recall.moves import WorkingSets
from trt_kv.runtime.backends.cuda.recall.moves_kernels import own_page

_COPY_BYTES = 8192


@triton.jit
def keep_token(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    page_ptr: tl.tensor,
    host_ptr: tl.tensor,
    summary_ptr: tl.tensor,
    table_ptr: tl.tensor,
    number: tl.tensor,
    offset: tl.tensor,
    head: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    DEVIATION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Write one KV head of a token to the open page. If that fills the page, copy it to the host and write its summary."""
    d = tl.arange(0, BLOCK_D)
    tl.store(page_ptr + offset * D + d, tl.load(k_ptr + d, mask=d < D), mask=d < D)
    tl.store(page_ptr + (K * P + offset) * D + d, tl.load(v_ptr + d, mask=d < D), mask=d < D)
    if offset == P - 1:
        # Threads other than those that wrote the token read it.
        tl.debug_barrier()
        host_page = tl.load(table_ptr + number)
        host_ptr += (host_page * 2 * K + head) * P * D
        for start in range(0, P * D, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(host_ptr + i, tl.load(page_ptr + i, mask=i < P * D), mask=i < P * D)
            tl.store(host_ptr + K * P * D + i, tl.load(page_ptr + K * P * D + i, mask=i < P * D), mask=i < P * D)
        summary_ptr += (host_page * K + head) * ROWS * D
        summarise(page_ptr, summary_ptr, P, D, DEVIATION, ROWS > 2, BLOCK_D, BLOCK_P)


@triton.jit(
    do_not_specialize=[
        *("kept_tokens", "n_sequences", "table_stride_b"),
        *("sink_pages", "newest_pages", "recent", "block_pages"),
    ],
    do_not_specialize_on_alignment=[
        *("cu_ptr", "remaining_ptr", "len_ptr", "prompt_len_ptr", "found_ptr", "table_ptr", "rows_ptr", "block_of_ptr"),
        *("chosen_for_ptr", "counts_ptr", "heads_ptr"),
    ],
)
def begin_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    remaining_ptr: tl.tensor,
    len_ptr: tl.tensor,
    prompt_len_ptr: tl.tensor,
    found_ptr: tl.tensor,
    table_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    block_of_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    host_ptr: tl.tensor,
    summaries_ptr: tl.tensor,
    last_query_ptr: tl.tensor,
    chosen_for_ptr: tl.tensor,
    probe_ptr: tl.tensor,
    latest_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    heads_ptr: tl.tensor,
    tau: tl.tensor,
    kept_share: tl.tensor,
    kept_tokens: tl.tensor,
    n_sequences: tl.tensor,
    table_stride_b: tl.tensor,
    sink_pages: tl.tensor,
    newest_pages: tl.tensor,
    recent: tl.tensor,
    block_pages: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    DEVIATION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per (sequence, KV head); those of KV head 0 also write the counts of their sequence.

    ``counts`` [7, B]: between, chosen, attended; the same of the next step; block. ``heads`` [4, B, K]: corrected, needs,
    wanted now, wanted ahead.
    """
    b = tl.program_id(0)
    head = tl.program_id(1)
    begin = tl.load(cu_ptr + b)
    end = tl.load(cu_ptr + b + 1)
    is_there = end > begin
    block = tl.load(block_of_ptr + tl.load(rows_ptr + b, mask=is_there, other=0))
    remaining = tl.load(remaining_ptr + end - 1, mask=is_there, other=0)
    n = tl.load(len_ptr + b)
    prompt_len = tl.load(prompt_len_ptr + b)
    budget = tl.load(found_ptr + b)
    between, chosen, attended = counted(
        is_there & (remaining < 0), n, prompt_len, budget, kept_share, kept_tokens, sink_pages, newest_pages, recent, P
    )
    # The next step has one token more, and generates if this step has read the end of the prompt.
    between_ahead, chosen_ahead, attended_ahead = counted(
        is_there & (remaining < 1), n + 1, prompt_len, budget, kept_share, kept_tokens, sink_pages, newest_pages, recent, P
    )
    if head == 0:
        counts_ptr += b
        tl.store(counts_ptr, between)
        tl.store(counts_ptr + n_sequences, chosen)
        tl.store(counts_ptr + 2 * n_sequences, attended)
        tl.store(counts_ptr + 3 * n_sequences, between_ahead)
        tl.store(counts_ptr + 4 * n_sequences, chosen_ahead)
        tl.store(counts_ptr + 5 * n_sequences, attended_ahead)
        tl.store(counts_ptr + 6 * n_sequences, block)

    corrected = tl.zeros([], tl.int1)
    needs = tl.zeros([], tl.int1)
    if is_there:
        G: tl.constexpr = H // K
        g = tl.arange(0, BLOCK_G)
        d = tl.arange(0, BLOCK_D)
        mask = (g < G)[:, None] & (d < D)[None, :]
        at = (head * G + g[:, None]) * D + d[None, :]
        before_ptr = last_query_ptr + block * H * D
        q = tl.load(q_ptr + (end - 1) * H * D + at, mask=mask, other=0.0)
        before = tl.load(before_ptr + at, mask=mask, other=0.0)
        chosen_for = tl.load(chosen_for_ptr + block * K + head)
        is_steady = is_steady_query(q.to(tl.float32), before.to(tl.float32), g < G, tau, G)
        corrected = (remaining < 0) & (is_steady == 0)
        needs = (attended > 0) & (corrected | (chosen_for != n))
        tl.store(probe_ptr + b.to(tl.int64) * H * D + at, tl.where(is_steady, before, q), mask=mask)
        tl.store(latest_ptr + b.to(tl.int64) * H * D + at, q, mask=mask)
        # No thread may overwrite an element that another one has yet to read.
        tl.debug_barrier()
        tl.store(before_ptr + at, q, mask=mask)
    # With the same query and the same page counts, the choice for the next step is that of this step.
    repeats = corrected & (attended > 0) & (between_ahead == between) & (chosen_ahead == chosen)
    heads_ptr += b * K + head
    tl.store(heads_ptr, corrected.to(tl.int64))
    tl.store(heads_ptr + n_sequences * K, needs.to(tl.int64))
    tl.store(heads_ptr + 2 * n_sequences * K, tl.where(needs, chosen, 0))
    tl.store(heads_ptr + 3 * n_sequences * K, tl.where(repeats, -1, chosen_ahead))

    if attended > 0:
        number = (n - 1) // P
        token = ((end - 1) * K + head) * D
        page_ptr = kv_ptr + ((block * block_pages + own_page(number, sink_pages, newest_pages)) * 2 * K + head) * P * D
        keep_token(
            *(k_ptr + token, v_ptr + token, page_ptr, host_ptr, summaries_ptr, table_ptr + b * table_stride_b),
            *(number, (n - 1) % P, head, K, P, D, ROWS, DEVIATION, BLOCK_D, BLOCK_P, BLOCK),
        )


@dataclass(frozen=True, kw_only=True)
class LayerStep:
    """One layer of one step: the arguments of RecallAttention, and the rows of them that belong to the layer."""

    args: Arguments[Tensor]
    q_NHD: Tensor
    """Contiguous."""
    table_BT: Tensor
    kv_len_B: Tensor
    limits: PageLimits

    @classmethod
    def of(cls, args: Arguments[Tensor]) -> Self:
        return cls(
            args=args,
            q_NHD=args.q.contiguous(),
            table_BT=args.page_table[args.layer],
            kv_len_B=args.kv_len[args.layer],
            limits=PageLimits(page_size=args.page_size, sinks=args.sinks, recent=args.recent),
        )


@dataclass(frozen=True, kw_only=True)
class BegunLayer:
    """Counts, flags and queries of a layer's sequences and KV heads before pages are chosen; int64 except queries."""

    now: PageCounts
    ahead: PageCounts
    """Counts of the next step, which has one token more, and generates if this one has read the end of the prompt."""
    blocks_B: Tensor
    corrected_BK: Tensor
    needs_BK: Tensor
    """1 for KV heads that must choose pages now: they were corrected, or no pages were chosen ahead."""
    wanted_BK: Tensor
    """Number of pages that these choose; 0 for others."""
    wanted_ahead_BK: Tensor
    """Number of pages that every KV head chooses for the next step; -1 if a corrected one keeps its choice of this step."""
    probe_BHD: Tensor
    """Queries to rank pages with now: the previous ones for KV heads that did not drift; undefined without a token."""
    latest_BHD: Tensor
    """Queries of this step."""


def begin_layer(sets: WorkingSets, block_of: Tensor, step: LayerStep) -> BegunLayer:
    """Write each generated token to its open page, and copy a page that it fills to the host, with its summary. Compare each
    sequence's last query of this step with the previous one, and store it in the block that ``block_of`` [M] gives for its row.
    """
    args = step.args
    n_sequences, (n_heads, head_size) = len(step.kv_len_B), step.q_NHD.shape[1:]
    n_kv_heads, page_size = sets.kv.shape[2:4]
    counts = torch.empty((7, n_sequences), dtype=torch.int64, device=sets.held.device)
    heads = torch.empty((4, n_sequences, n_kv_heads), dtype=torch.int64, device=sets.held.device)
    probe_BHD, latest_BHD = (
        torch.empty((n_sequences, n_heads, head_size), dtype=step.q_NHD.dtype, device=sets.held.device) for _ in range(2)
    )
    launch(
        begin_kernel,
        (n_sequences, n_kv_heads),
        warps=1,  # each program does little, and with one warp its sums need no shared memory
        q_ptr=step.q_NHD,
        k_ptr=args.k.contiguous(),
        v_ptr=args.v.contiguous(),
        cu_ptr=args.cu_tokens,
        remaining_ptr=args.prompt_remaining,
        len_ptr=step.kv_len_B,
        prompt_len_ptr=args.prompt_len,
        found_ptr=args.adaptive_budget[args.layer],
        table_ptr=step.table_BT,
        rows_ptr=args.query_rows[args.layer].contiguous(),
        block_of_ptr=block_of,
        kv_ptr=sets.kv,
        host_ptr=sets.host_kv,
        summaries_ptr=sets.summaries,
        last_query_ptr=sets.last_query,
        chosen_for_ptr=sets.chosen_for,
        probe_ptr=probe_BHD,
        latest_ptr=latest_BHD,
        counts_ptr=counts,
        heads_ptr=heads,
        tau=float(args.tau),
        kept_share=float(args.kept_share),
        kept_tokens=args.kept_tokens,
        n_sequences=n_sequences,
        table_stride_b=step.table_BT.stride(0),
        sink_pages=step.limits.n_sinks,
        newest_pages=step.limits.n_newest,
        recent=step.limits.recent,
        block_pages=sets.block_pages,
        H=n_heads,
        K=n_kv_heads,
        P=page_size,
        D=head_size,
        ROWS=sets.summaries.shape[2],
        DEVIATION=int(args.summary == DEVIATION),
        BLOCK_D=power_of_2(head_size),
        BLOCK_G=power_of_2(n_heads // n_kv_heads),
        BLOCK_P=min(32, power_of_2(page_size)),
        BLOCK=min(power_of_2(page_size * head_size), _COPY_BYTES // sets.kv.itemsize),
    )
    now, ahead = (PageCounts(between=b, chosen=c, attended=a) for b, c, a in (counts[:3], counts[3:6]))
    corrected_BK, needs_BK, wanted_BK, wanted_ahead_BK = heads
    return BegunLayer(
        now=now,
        ahead=ahead,
        blocks_B=counts[6],
        corrected_BK=corrected_BK,
        needs_BK=needs_BK,
        wanted_BK=wanted_BK,
        wanted_ahead_BK=wanted_ahead_BK,
        probe_BHD=probe_BHD,
        latest_BHD=latest_BHD,
    )
