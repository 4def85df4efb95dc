"""How a layer of a step begins where recall is driven by the device: the token is kept, drift tested, lengths counted.

H query heads, K KV heads, D head size, N tokens, B sequences, T pages of a page table.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trt_kv.plugins.recall_attention.begin_kernels import begin_kernel
from trt_kv.plugins.recall_attention.choice_triton import PageCounts
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.plugins.recall_attention.working_set_triton import WorkingSets
from trt_kv.plugins.triton_launch import launch, power_of_2

_COPY_BYTES = 8192


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """What a layer's attributes say of its choice of pages."""

    limits: PageLimits
    kept_share: float
    kept_tokens: int
    tau: float
    summary: int
    pooling: int
    softmax_scale: float


@dataclass(frozen=True, kw_only=True)
class StepTensors:
    """One layer's tokens of a step, and its sequences, as RecallAttention's spec says."""

    q_NHD: Tensor
    k_NKD: Tensor
    v_NKD: Tensor
    cu_tokens: Tensor
    remaining_N: Tensor
    table_BT: Tensor
    kv_len_B: Tensor
    prompt_len_B: Tensor
    found_budget_B: Tensor
    query_rows_B: Tensor


@dataclass(frozen=True, kw_only=True)
class BegunLayer:
    """What is known of a layer's sequences and KV heads before pages are chosen; int64 but for queries."""

    now: PageCounts
    ahead: PageCounts
    """Of the next step, which has one token more and none of the prompt where this one has read all of it."""
    blocks_B: Tensor
    corrected_BK: Tensor
    needs_BK: Tensor
    """1 for KV heads that have to choose now: corrected, or nothing was chosen ahead."""
    wanted_BK: Tensor
    """How many pages these choose; 0 for others."""
    wanted_ahead_BK: Tensor
    """How many all choose for the next step; -1 where that is what a corrected KV head chooses now."""
    probe_BHD: Tensor
    """Queries that pages are ranked for now, the last ones of KV heads that did not drift; undefined without a token."""
    latest_BHD: Tensor
    """Queries of this step."""


def begin_layer(sets: WorkingSets, block_of: Tensor, step: StepTensors, choosing: Choosing) -> BegunLayer:
    """Put each generated token into its open page, and a page that it fills on the host, with its summary; compare each
    sequence's last query of this step with the one before, and remember it in the block that ``block_of`` [M] has for its row.
    """
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
        warps=1,  # little to do for each, and sums that need no memory shared by warps
        q_ptr=step.q_NHD,
        k_ptr=step.k_NKD.contiguous(),
        v_ptr=step.v_NKD.contiguous(),
        cu_ptr=step.cu_tokens,
        remaining_ptr=step.remaining_N,
        len_ptr=step.kv_len_B,
        prompt_len_ptr=step.prompt_len_B,
        found_ptr=step.found_budget_B,
        table_ptr=step.table_BT,
        rows_ptr=step.query_rows_B.contiguous(),
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
        tau=float(choosing.tau),
        kept_share=float(choosing.kept_share),
        kept_tokens=choosing.kept_tokens,
        n_sequences=n_sequences,
        table_stride_b=step.table_BT.stride(0),
        sink_pages=choosing.limits.n_sinks,
        newest_pages=choosing.limits.n_newest,
        recent=choosing.limits.recent,
        block_pages=sets.block_pages,
        H=n_heads,
        K=n_kv_heads,
        P=page_size,
        D=head_size,
        DEVIATION=choosing.summary,
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
