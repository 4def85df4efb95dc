"""Working sets of RecallAttention on the GPU: what each KV head holds, what it has to bring, and where that is read.

H query heads, K KV heads, P page size, D head size, U blocks, S slots, C most chosen pages, M host pages, B sequences, T pages
of a page table, E = B K C rows of moves. A page number counts a sequence's pages from 0. A block is ``block_pages`` pages on
the device, of one layer of one sequence: sinks, a ring of the newest (page j at j mod n_newest), and from ``first_slot`` on
slots, in which every KV head may hold another page's part.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trt_kv.plugins.recall_attention.choice_triton import PageCounts
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.plugins.recall_attention.working_set_kernels import keep_kernel, need_kernel, places_kernel, plan_kernel
from trt_kv.plugins.triton_launch import launch, power_of_2

_TILE = 256
_COPY_BYTES = 8192


@dataclass(frozen=True, kw_only=True)
class WorkingSets:
    """Both tiers, and what changes with the contents of a cache; all but ``host_kv`` on the device, all but floats int64."""

    host_kv: Tensor
    """[M, 2, K, P, D], pinned where the device is a GPU."""
    kv: Tensor
    """[U * block_pages, 2, K, P, D]."""
    summaries: Tensor
    """[M, K, 2, D]."""
    last_query: Tensor
    """[U, H, D]: the query of each block's last token."""
    held: Tensor
    """[U, K, S]: the page number in each slot, -1 for none."""
    chosen: Tensor
    """[U, K, C]: the page numbers chosen last, ascending; as many are defined as the step's counts say."""
    slots: Tensor
    """[U, K, C]: the slot of each chosen page."""
    chosen_for: Tensor
    """[U, K]: the number of tokens of the step that ``chosen`` is for; 0 for none."""
    moved: Tensor
    """[U, K, 2]: page-heads brought at once and ahead since the block was given to its sequence."""
    first_slot: int
    block_pages: int


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Page-heads to bring, as ``recall_pages`` takes them; rows of nothing are -1."""

    rows: Tensor
    """[E, 3]: KV head, host page, device page."""
    unread: Tensor
    """[E]: 1 where the running step does not read the slot."""
    read: Tensor
    """[E]: 1 where it does, so that the move waits for its attention."""


def keep_tokens(
    sets: WorkingSets,
    k_NKD: Tensor,
    v_NKD: Tensor,
    cu_tokens: Tensor,
    table_BT: Tensor,
    kv_len_B: Tensor,
    counts: PageCounts,
    blocks_B: Tensor,
    limits: PageLimits,
) -> None:
    """Put each generated token into its open page, and store pages that it fills on the host, at those of ``table_BT``."""
    n_kv_heads, page_size, head_size = sets.kv.shape[2:]
    launch(
        keep_kernel,
        (len(kv_len_B), n_kv_heads),
        k_ptr=k_NKD.contiguous(),
        v_ptr=v_NKD.contiguous(),
        cu_ptr=cu_tokens,
        table_ptr=table_BT,
        len_ptr=kv_len_B,
        attended_ptr=counts.attended,
        blocks_ptr=blocks_B,
        kv_ptr=sets.kv,
        host_ptr=sets.host_kv,
        table_stride_b=table_BT.stride(0),
        sink_pages=limits.n_sinks,
        newest_pages=limits.n_newest,
        block_pages=sets.block_pages,
        K=n_kv_heads,
        P=page_size,
        D=head_size,
        BLOCK_D=power_of_2(head_size),
        BLOCK=min(power_of_2(page_size * head_size), _COPY_BYTES // sets.kv.itemsize),
    )


def heads_in_need(
    sets: WorkingSets, corrected_BK: Tensor, kv_len_B: Tensor, counts: PageCounts, blocks_B: Tensor
) -> tuple[Tensor, PageCounts]:
    """1 for KV heads that have to choose now, [B, K]; and ``counts`` with nothing to choose in sequences that have none."""
    needs_BK, gated_B = torch.empty_like(corrected_BK), torch.empty_like(counts.chosen)
    n_kv_heads = corrected_BK.shape[1]
    launch(
        need_kernel,
        (len(kv_len_B),),
        warps=1,
        corrected_ptr=corrected_BK,
        len_ptr=kv_len_B,
        n_chosen_ptr=counts.chosen,
        attended_ptr=counts.attended,
        blocks_ptr=blocks_B,
        chosen_for_ptr=sets.chosen_for,
        needs_ptr=needs_BK,
        gated_ptr=gated_B,
        K=n_kv_heads,
        BLOCK_K=power_of_2(n_kv_heads),
    )
    gated = PageCounts(between=counts.between, chosen=gated_B, attended=counts.attended, prompt=counts.prompt)
    return needs_BK, gated


def plan_moves(
    sets: WorkingSets,
    wanted_BKT: Tensor,
    table_BT: Tensor,
    kv_len_B: Tensor,
    counts: PageCounts,
    blocks_B: Tensor,
    *,
    needs_BK: Tensor | None = None,
    n_read_B: Tensor | None = None,
) -> Moves:
    """What has to be brought so that ``wanted_BKT`` is held, which is what working sets hold and have chosen from then on.

    ``needs_BK``: now, in these KV heads. ``n_read_B``: for the next step, whose ``counts`` these are, in all KV heads, while
    the running step reads the first so many chosen pages. One of them is given.
    """
    assert (needs_BK is None) != (n_read_B is None)
    n_sequences, n_kv_heads, n_table = wanted_BKT.shape
    n_slots, n_most = sets.held.shape[2], sets.chosen.shape[2]
    sizes = {"rows": 3 * n_most, "unread": n_most, "read": n_most, "places": n_most, "free": 2 * n_slots}
    n_rows = n_sequences * n_kv_heads
    made = {name: torch.empty((n_rows, n), dtype=torch.int64, device=sets.held.device) for name, n in sizes.items()}
    pointers: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in made.items()}
    launch(
        plan_kernel,
        (n_sequences, n_kv_heads),
        wanted_ptr=wanted_BKT,
        table_ptr=table_BT,
        len_ptr=kv_len_B,
        n_wanted_ptr=counts.chosen,
        attended_ptr=counts.attended,
        blocks_ptr=blocks_B,
        needs_ptr=counts.chosen if needs_BK is None else needs_BK,
        n_read_ptr=counts.chosen if n_read_B is None else n_read_B,
        held_ptr=sets.held,
        chosen_ptr=sets.chosen,
        slots_ptr=sets.slots,
        chosen_for_ptr=sets.chosen_for,
        moved_ptr=sets.moved,
        **pointers,
        table_stride_b=table_BT.stride(0),
        n_table=n_table,
        first_slot=sets.first_slot,
        block_pages=sets.block_pages,
        K=n_kv_heads,
        S=n_slots,
        C=n_most,
        AHEAD=int(n_read_B is not None),
        STEPS=n_most.bit_length(),
        BLOCK=min(_TILE, power_of_2(n_slots)),
    )
    return Moves(rows=made["rows"].view(-1, 3), unread=made["unread"].view(-1), read=made["read"].view(-1))


def attended_places(
    sets: WorkingSets, kv_len_B: Tensor, counts: PageCounts, blocks_B: Tensor, limits: PageLimits, n_table: int
) -> Tensor:
    """The device pages that each KV head attends to, [B, K, T]; those of ``counts.attended[b]`` tokens are defined."""
    n_sequences, n_kv_heads = len(kv_len_B), sets.held.shape[1]
    head_table_BKT = torch.empty((n_sequences, n_kv_heads, n_table), dtype=torch.int64, device=sets.held.device)
    launch(
        places_kernel,
        (n_sequences, n_kv_heads),
        len_ptr=kv_len_B,
        n_chosen_ptr=counts.chosen,
        attended_ptr=counts.attended,
        blocks_ptr=blocks_B,
        slots_ptr=sets.slots,
        head_table_ptr=head_table_BKT,
        n_table=n_table,
        sink_pages=limits.n_sinks,
        newest_pages=limits.n_newest,
        first_slot=sets.first_slot,
        block_pages=sets.block_pages,
        K=n_kv_heads,
        P=sets.kv.shape[3],
        C=sets.chosen.shape[2],
        BLOCK_J=128,
    )
    return head_table_BKT
