"""The Triton kernels that ``moves.py`` launches; axis letters are defined there."""

import triton
import triton.language as tl

from trt_kv.plugins.recall_attention.rank_kernels import choose_for_head


@triton.jit
def own_page(number: tl.tensor, sink_pages: tl.tensor, newest_pages: tl.tensor) -> tl.tensor:
    """Index within its block of a sink or one of the newest pages."""
    return tl.where(number < sink_pages, number, sink_pages + number % newest_pages)


@triton.jit
def place_in(list_ptr: tl.tensor, n: tl.tensor, values: tl.tensor, STEPS: tl.constexpr) -> tl.tensor:
    """Index of each value among the first ``n`` < 2**STEPS elements of an ascending list, by bisection; -1 if absent."""
    low = tl.zeros_like(values)
    high = low + n
    for _ in range(STEPS):
        middle = (low + high) // 2
        is_less = (low < high) & (tl.load(list_ptr + middle, mask=low < high, other=0) < values)
        low = tl.where(is_less, middle + 1, low)
        high = tl.where(is_less, high, middle)
    is_there = tl.load(list_ptr + low, mask=low < n, other=-2) == values
    return tl.where(is_there, low, -1)


@triton.jit
def plan_for_head(
    wanted_ptr: tl.tensor,
    n_wanted: tl.tensor,
    n_read: tl.tensor,
    table_ptr: tl.tensor,
    held_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    moved_ptr: tl.tensor,
    places_ptr: tl.tensor,
    free_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    unread_ptr: tl.tensor,
    read_ptr: tl.tensor,
    head: tl.tensor,
    first_slot_page: tl.tensor,
    S: tl.constexpr,
    C: tl.constexpr,
    AHEAD: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """Plan the copies of one KV head: each wanted page that no slot holds, in order, goes into a slot whose page is not wanted,
    first into those that the running step does not read. The same rule as the host's ``planned_moves``.

    AHEAD: the running step reads the first ``n_read`` of the pages chosen for it. All pointers are to this KV head's data.
    """
    tile = tl.arange(0, BLOCK)
    for start in range(0, C, BLOCK):
        tl.store(places_ptr + start + tile, tl.full([BLOCK], -1, tl.int64), mask=start + tile < C)
    tl.debug_barrier()

    n_unread = 0
    n_others = 0
    for start in range(0, S, BLOCK):
        slot = start + tile
        held = tl.load(held_ptr + slot, mask=slot < S, other=-1)
        place = place_in(wanted_ptr, n_wanted, held, STEPS)
        tl.store(places_ptr + place, slot.to(tl.int64), mask=place >= 0)
        is_free = (slot < S) & (place < 0)
        is_read = tl.zeros([BLOCK], tl.int1)
        if AHEAD:
            is_read = place_in(chosen_ptr, n_read, held, STEPS) >= 0
        unread = (is_free & (is_read == 0)).to(tl.int32)
        others = (is_free & is_read).to(tl.int32)
        tl.store(free_ptr + n_unread + tl.cumsum(unread) - 1, slot.to(tl.int64), mask=unread == 1)
        tl.store(free_ptr + S + n_others + tl.cumsum(others) - 1, slot.to(tl.int64), mask=others == 1)
        n_unread += tl.sum(unread, 0)
        n_others += tl.sum(others, 0)
    # Threads other than those that wrote places and free slots read them, and held and chosen pages are overwritten below.
    tl.debug_barrier()

    n_missing = 0
    for start in range(0, C, BLOCK):
        i = start + tile
        page = tl.load(wanted_ptr + i, mask=i < n_wanted, other=0)
        slot = tl.load(places_ptr + i, mask=i < n_wanted, other=0)
        missing = slot < 0
        nth = n_missing + tl.cumsum(missing.to(tl.int32)) - 1
        waits = missing & (nth >= n_unread)
        free = tl.load(free_ptr + tl.where(waits, S + nth - n_unread, nth), mask=missing, other=0)
        slot = tl.where(missing, free, slot)
        tl.store(held_ptr + slot, page, mask=missing)
        tl.store(chosen_ptr + i, page, mask=i < n_wanted)
        tl.store(slots_ptr + i, slot, mask=i < n_wanted)
        host_page = tl.load(table_ptr + page, mask=missing, other=-1)
        tl.store(rows_ptr + 3 * i, tl.where(missing, head, -1).to(tl.int64), mask=i < C)
        tl.store(rows_ptr + 3 * i + 1, host_page, mask=i < C)
        tl.store(rows_ptr + 3 * i + 2, first_slot_page + slot, mask=i < C)
        tl.store(unread_ptr + i, (missing & (waits == 0)).to(tl.int64), mask=i < C)
        if AHEAD:
            tl.store(read_ptr + i, waits.to(tl.int64), mask=i < C)
        n_missing += tl.sum(missing.to(tl.int32), 0)
    tl.store(moved_ptr, tl.load(moved_ptr) + n_missing)


@triton.jit
def nothing(flags_ptr: tl.tensor, C: tl.constexpr, BLOCK: tl.constexpr) -> None:
    """Clear the flags of a KV head's C rows of moves."""
    for start in range(0, C, BLOCK):
        i = start + tl.arange(0, BLOCK)
        tl.store(flags_ptr + i, tl.zeros([BLOCK], tl.int64), mask=i < C)


@triton.jit(
    do_not_specialize=["table_stride_b", "n_table", "first_slot", "block_pages"],
    do_not_specialize_on_alignment=[
        *("table_ptr", "len_ptr", "n_wanted_ptr", "attended_ptr", "blocks_ptr", "n_read_ptr", "wanted_ptr"),
        *("held_ptr", "chosen_ptr", "slots_ptr", "chosen_for_ptr", "moved_ptr", "unread_ptr", "read_ptr"),
    ],
)
def plan_kernel(
    wanted_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    n_wanted_ptr: tl.tensor,
    attended_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    n_read_ptr: tl.tensor,
    held_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    chosen_for_ptr: tl.tensor,
    moved_ptr: tl.tensor,
    places_ptr: tl.tensor,
    free_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    unread_ptr: tl.tensor,
    read_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    n_table: tl.tensor,
    first_slot: tl.tensor,
    block_pages: tl.tensor,
    K: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per (sequence, KV head): moves for the next step. ``n_wanted`` -1: wanted pages are chosen and held."""
    b = tl.program_id(0)
    head = tl.program_id(1)
    row = b.to(tl.int64) * K + head
    block = tl.load(blocks_ptr + b)
    of_head = block * K + head
    is_generated = tl.load(attended_ptr + b) > 0
    n_wanted = tl.load(n_wanted_ptr + row)
    if is_generated & (n_wanted >= 0):
        plan_for_head(
            *(wanted_ptr + row * n_table, n_wanted, tl.load(n_read_ptr + b), table_ptr + b * table_stride_b),
            *(held_ptr + of_head * S, chosen_ptr + of_head * C, slots_ptr + of_head * C, moved_ptr + of_head * 2 + 1),
            *(places_ptr + row * C, free_ptr + row * 2 * S, rows_ptr + row * 3 * C, unread_ptr + row * C, read_ptr + row * C),
            *(head, block * block_pages + first_slot, S, C, 1, STEPS, BLOCK),
        )
    else:
        nothing(unread_ptr + row * C, C, BLOCK)
        nothing(read_ptr + row * C, C, BLOCK)
    if is_generated:
        tl.store(chosen_for_ptr + of_head, tl.load(len_ptr + b) + 1)


@triton.jit
def places_for_head(
    slots_ptr: tl.tensor,
    to_ptr: tl.tensor,
    n_pages: tl.tensor,
    n_attended: tl.tensor,
    n_chosen: tl.tensor,
    first_page: tl.tensor,
    sink_pages: tl.tensor,
    newest_pages: tl.tensor,
    first_slot: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Write the device pages that a KV head attends to: sinks, chosen, newest. ``first_page``: the first one of its block."""
    for start in range(0, n_attended, BLOCK):
        i = start + tl.arange(0, BLOCK)
        is_chosen = (i >= sink_pages) & (i < sink_pages + n_chosen)
        slot = tl.load(slots_ptr + i - sink_pages, mask=is_chosen, other=0)
        others = own_page(tl.where(i < sink_pages, i, n_pages - n_attended + i), sink_pages, newest_pages)
        tl.store(to_ptr + i, first_page + tl.where(is_chosen, first_slot + slot, others), mask=i < n_attended)


@triton.jit(
    do_not_specialize=["table_stride_b", "n_table", "sink_pages", "newest_pages", "first_slot", "block_pages"],
    do_not_specialize_on_alignment=[
        *("table_ptr", "len_ptr", "between_ptr", "n_chosen_ptr", "attended_ptr", "blocks_ptr", "needs_ptr"),
        *("held_ptr", "last_ptr", "slots_ptr", "chosen_for_ptr", "moved_ptr", "unread_ptr", "head_table_ptr"),
    ],
)
def now_kernel(
    bounds_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    between_ptr: tl.tensor,
    n_chosen_ptr: tl.tensor,
    attended_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    needs_ptr: tl.tensor,
    held_ptr: tl.tensor,
    last_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    chosen_for_ptr: tl.tensor,
    moved_ptr: tl.tensor,
    places_ptr: tl.tensor,
    free_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    unread_ptr: tl.tensor,
    head_table_ptr: tl.tensor,
    softmax_scale: tl.tensor,
    table_stride_b: tl.tensor,
    n_table: tl.tensor,
    sink_pages: tl.tensor,
    newest_pages: tl.tensor,
    first_slot: tl.tensor,
    block_pages: tl.tensor,
    H: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    MAXIMUM: tl.constexpr,
    BLOCK_G: tl.constexpr,
    FEW: tl.constexpr,
    MANY: tl.constexpr,
) -> None:
    """One program per (sequence, KV head). With ``needs`` it chooses pages for the running step and plans moves; it always
    writes its page table.

    ``chosen``: the choice made here; ``last``: the chosen pages that working sets store.
    """
    b = tl.program_id(0)
    head = tl.program_id(1)
    row = b.to(tl.int64) * K + head
    G: tl.constexpr = H // K
    block = tl.load(blocks_ptr + b)
    of_head = block * K + head
    n = tl.load(len_ptr + b)
    n_chosen = tl.load(n_chosen_ptr + b).to(tl.int32)
    n_attended = tl.cdiv(tl.load(attended_ptr + b), P).to(tl.int32)
    if tl.load(needs_ptr + row) != 0:
        choose_for_head(
            *(bounds_ptr, keys_ptr, chosen_ptr, row, tl.load(between_ptr + b).to(tl.int32), n_chosen, softmax_scale),
            *(n_table, sink_pages, G, SOFTMAX, MAXIMUM, BLOCK_G, FEW, MANY),
        )
        # Threads other than those that wrote the chosen pages read them; the same holds for slots below.
        tl.debug_barrier()
        plan_for_head(
            *(chosen_ptr + row * n_table, n_chosen.to(tl.int64), n_chosen, table_ptr + b * table_stride_b),
            *(held_ptr + of_head * S, last_ptr + of_head * C, slots_ptr + of_head * C, moved_ptr + of_head * 2),
            *(places_ptr + row * C, free_ptr + row * 2 * S, rows_ptr + row * 3 * C, unread_ptr + row * C, unread_ptr),
            *(head, block * block_pages + first_slot, S, C, 0, STEPS, BLOCK),
        )
        tl.store(chosen_for_ptr + of_head, n)
        tl.debug_barrier()
    else:
        nothing(unread_ptr + row * C, C, BLOCK)
    places_for_head(
        *(slots_ptr + of_head * C, head_table_ptr + row * n_table, tl.cdiv(n, P).to(tl.int32), n_attended, n_chosen),
        *(block * block_pages, sink_pages, newest_pages, first_slot, BLOCK),
    )
