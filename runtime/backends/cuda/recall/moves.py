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

from trt_kv.plugins.recall_attention.choice_triton import CHOICE_WARPS, PageCounts, choice_arguments
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.plugins.triton_launch import launch, power_of_2
from trt_kv.runtime.backends.cuda.recall.moves_kernels import now_kernel, plan_kernel

_TILE = 256


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
    """Page-heads to bring, as ``recall_pages`` takes them."""

    rows: Tensor
    """[E, 3]: KV head, host page, device page; undefined where no flag is set."""
    unread: Tensor
    """[E]: 1 where the running step does not read what is in the slot."""
    read: Tensor
    """[E]: 1 where it does, so that the move waits for its attention."""


def plan_now(
    sets: WorkingSets,
    bounds_BHT: Tensor,
    table_BT: Tensor,
    kv_len_B: Tensor,
    counts: PageCounts,
    blocks_B: Tensor,
    needs_BK: Tensor,
    limits: PageLimits,
    pooling: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """KV heads in need choose for the running step, by ``bounds_BHT``, and what they miss has to be brought at once.

    Returns moves [E, 3] and which of them are to be made, [E]; and the device pages that each KV head attends to, [B, K, T]:
    those of ``counts.attended[b]`` tokens are defined.
    """
    chosen_BKT = torch.empty((*needs_BK.shape, table_BT.shape[1]), dtype=torch.int64, device=sets.held.device)
    places_BKT = torch.empty_like(chosen_BKT)
    rows, made, arguments = _plan_arguments(sets, needs_BK)
    launch(
        now_kernel,
        tuple(needs_BK.shape),
        warps=CHOICE_WARPS,
        **choice_arguments(bounds_BHT, chosen_BKT, pooling, softmax_scale),
        **arguments,
        table_ptr=table_BT,
        len_ptr=kv_len_B,
        between_ptr=counts.between,
        n_chosen_ptr=counts.chosen,
        attended_ptr=counts.attended,
        blocks_ptr=blocks_B,
        needs_ptr=needs_BK,
        last_ptr=sets.chosen,
        head_table_ptr=places_BKT,
        table_stride_b=table_BT.stride(0),
        sink_pages=limits.n_sinks,
        newest_pages=limits.n_newest,
        P=limits.page_size,
    )
    return rows, made, places_BKT


def plan_ahead(
    sets: WorkingSets,
    wanted_BKT: Tensor,
    n_wanted_BK: Tensor,
    table_BT: Tensor,
    kv_len_B: Tensor,
    ahead: PageCounts,
    n_read_B: Tensor,
    blocks_B: Tensor,
) -> Moves:
    """What has to be brought so that ``wanted_BKT``, chosen for the next step, is held: what working sets hold and have chosen
    from then on. ``n_wanted_BK`` -1: they do already. The running step reads the first ``n_read_B`` chosen pages.
    """
    rows, unread, arguments = _plan_arguments(sets, n_wanted_BK)
    read = torch.empty_like(unread)
    launch(
        plan_kernel,
        tuple(n_wanted_BK.shape),
        **arguments,
        wanted_ptr=wanted_BKT,
        table_ptr=table_BT,
        len_ptr=kv_len_B,
        n_wanted_ptr=n_wanted_BK,
        attended_ptr=ahead.attended,
        blocks_ptr=blocks_B,
        n_read_ptr=n_read_B,
        chosen_ptr=sets.chosen,
        read_ptr=read,
        table_stride_b=table_BT.stride(0),
        n_table=wanted_BKT.shape[2],
        K=n_wanted_BK.shape[1],
    )
    return Moves(rows=rows, unread=unread, read=read)


def _plan_arguments(sets: WorkingSets, of_heads_BK: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Moves and flags to be written, and what both kernels that plan are given."""
    n_slots, n_most = sets.held.shape[2], sets.chosen.shape[2]
    widths = {"rows": 3 * n_most, "unread": n_most, "places": n_most, "free": 2 * n_slots}
    n_rows = of_heads_BK.numel()
    made = {name: torch.empty((n_rows, n), dtype=torch.int64, device=sets.held.device) for name, n in widths.items()}
    arguments: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in made.items()}
    arguments |= {f"{name}_ptr": getattr(sets, name) for name in ("held", "slots", "chosen_for", "moved")}
    arguments |= {"first_slot": sets.first_slot, "block_pages": sets.block_pages}
    arguments |= {"S": n_slots, "C": n_most, "STEPS": n_most.bit_length(), "BLOCK": min(_TILE, power_of_2(n_slots))}
    return made["rows"].view(-1, 3), made["unread"].view(-1), arguments
