"""Working sets of RecallAttention on the GPU: the pages that each KV head holds, and the plan of the copies that it needs.

H query heads, K KV heads, P page size, D head size, U blocks, S slots, C most chosen pages, M host pages, B sequences, T pages
of a page table, E = B K C rows of moves. A page number is the index of a page within its sequence. A block is ``block_pages``
device pages of one layer of one sequence: sinks, a ring of the newest pages (page j at j mod n_newest), and from
``first_slot`` on slots, in which each KV head may hold its part of a different page.
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
    """Both tiers, and the state of all blocks. All tensors except ``host_kv`` are on the device; integers are int64."""

    host_kv: Tensor
    """[M, 2, K, P, D], pinned if the device is a GPU."""
    kv: Tensor
    """[U * block_pages, 2, K, P, D]."""
    summaries: Tensor
    """[M, K, R, D]: bounds, and codes behind them if there are any."""
    last_query: Tensor
    """[U, H, D]: the query of each block's last token."""
    held: Tensor
    """[U, K, S]: the page number in each slot, -1 for none."""
    chosen: Tensor
    """[U, K, C]: the page numbers chosen last, ascending; the step's counts give how many are defined."""
    slots: Tensor
    """[U, K, C]: the slot of each chosen page."""
    chosen_for: Tensor
    """[U, K]: the number of tokens of the step that ``chosen`` is for; 0 for none."""
    moved: Tensor
    """[U, K, 2]: page-heads copied while the step waited and ahead of it, since the block was allocated to its sequence."""
    first_slot: int
    block_pages: int


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Page-heads to copy, in the format of ``recall_pages``."""

    rows: Tensor
    """[E, 3]: KV head, host page, device page; undefined in rows without a flag."""
    unread: Tensor
    """[E]: 1 for moves into slots that the running step does not read."""
    read: Tensor
    """[E]: 1 for moves into slots that it reads, which wait for its attention."""


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
    """Choose pages for the running step, by ``bounds_BHT``, for KV heads with a flag in ``needs_BK``, and plan copies of those
    that are missing.

    Returns moves [E, 3], which of them are to be made, [E], and the device pages that each KV head attends to, [B, K, T],
    defined for ``counts.attended[b]`` tokens.
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
    """The copies after which working sets hold ``wanted_BKT``, the pages chosen for the next step; updates what they hold and
    have chosen. ``n_wanted_BK`` -1: they hold them already. The running step reads the first ``n_read_B`` chosen pages.
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
    """Output tensors for moves and flags, and the arguments that both planning kernels share."""
    n_slots, n_most = sets.held.shape[2], sets.chosen.shape[2]
    widths = {"rows": 3 * n_most, "unread": n_most, "places": n_most, "free": 2 * n_slots}
    n_rows = of_heads_BK.numel()
    made = {name: torch.empty((n_rows, n), dtype=torch.int64, device=sets.held.device) for name, n in widths.items()}
    arguments: dict[str, Any] = {f"{name}_ptr": tensor for name, tensor in made.items()}
    arguments |= {f"{name}_ptr": getattr(sets, name) for name in ("held", "slots", "chosen_for", "moved")}
    arguments |= {"first_slot": sets.first_slot, "block_pages": sets.block_pages}
    arguments |= {"S": n_slots, "C": n_most, "STEPS": n_most.bit_length(), "BLOCK": min(_TILE, power_of_2(n_slots))}
    return made["rows"].view(-1, 3), made["unread"].view(-1), arguments
