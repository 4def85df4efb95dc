"""The Triton functions behind ``working_set_triton.py``, which starts them and says what the letters mean."""

import triton
import triton.language as tl


@triton.jit
def own_page(number: tl.tensor, sink_pages: tl.tensor, newest_pages: tl.tensor) -> tl.tensor:
    """Where in its block a sink or one of the newest pages is."""
    return tl.where(number < sink_pages, number, sink_pages + number % newest_pages)


@triton.jit(
    do_not_specialize=["table_stride_b", "sink_pages", "newest_pages", "block_pages"],
    do_not_specialize_on_alignment=["cu_ptr", "table_ptr", "len_ptr", "attended_ptr", "blocks_ptr"],
)
def keep_kernel(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cu_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    attended_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    kv_ptr: tl.tensor,
    host_ptr: tl.tensor,
    table_stride_b: tl.tensor,
    sink_pages: tl.tensor,
    newest_pages: tl.tensor,
    block_pages: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per (sequence, KV head): a generated token into the open page; a page that it fills to the host."""
    b = tl.program_id(0)
    head = tl.program_id(1)
    if tl.load(attended_ptr + b) == 0:
        return
    position = tl.load(len_ptr + b) - 1
    number = position // P
    offset = position % P
    page = tl.load(blocks_ptr + b) * block_pages + own_page(number, sink_pages, newest_pages)
    page_ptr = kv_ptr + (page * 2 * K + head) * P * D
    d = tl.arange(0, BLOCK_D)
    at = ((tl.load(cu_ptr + b + 1) - 1) * K + head) * D + d
    tl.store(page_ptr + offset * D + d, tl.load(k_ptr + at, mask=d < D), mask=d < D)
    tl.store(page_ptr + (K * P + offset) * D + d, tl.load(v_ptr + at, mask=d < D), mask=d < D)
    if offset == P - 1:
        # The token is read by other threads than wrote it.
        tl.debug_barrier()
        to_ptr = host_ptr + (tl.load(table_ptr + b * table_stride_b + number) * 2 * K + head) * P * D
        for start in range(0, P * D, BLOCK):
            i = start + tl.arange(0, BLOCK)
            tl.store(to_ptr + i, tl.load(page_ptr + i, mask=i < P * D), mask=i < P * D)
            tl.store(to_ptr + K * P * D + i, tl.load(page_ptr + K * P * D + i, mask=i < P * D), mask=i < P * D)


@triton.jit(do_not_specialize_on_alignment=["len_ptr", "n_chosen_ptr", "attended_ptr", "blocks_ptr", "gated_ptr"])
def need_kernel(
    corrected_ptr: tl.tensor,
    len_ptr: tl.tensor,
    n_chosen_ptr: tl.tensor,
    attended_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    chosen_for_ptr: tl.tensor,
    needs_ptr: tl.tensor,
    gated_ptr: tl.tensor,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """One program per sequence: KV heads that were corrected, or for which nothing was chosen ahead."""
    b = tl.program_id(0)
    heads = tl.arange(0, BLOCK_K)
    corrected = tl.load(corrected_ptr + b * K + heads, mask=heads < K, other=0)
    chosen_for = tl.load(chosen_for_ptr + tl.load(blocks_ptr + b) * K + heads, mask=heads < K, other=0)
    is_generated = tl.load(attended_ptr + b) > 0
    needs = (is_generated & (heads < K) & ((corrected != 0) | (chosen_for != tl.load(len_ptr + b)))).to(tl.int64)
    tl.store(needs_ptr + b * K + heads, needs, mask=heads < K)
    tl.store(gated_ptr + b, tl.where(tl.sum(needs, 0) > 0, tl.load(n_chosen_ptr + b), 0))


@triton.jit
def place_in(list_ptr: tl.tensor, n: tl.tensor, values: tl.tensor, STEPS: tl.constexpr) -> tl.tensor:
    """Where each value stands among the first ``n`` < 2**STEPS of an ascending list; -1 where it does not."""
    low = tl.zeros_like(values)
    high = low + n
    for _ in range(STEPS):
        middle = (low + high) // 2
        is_less = (low < high) & (tl.load(list_ptr + middle, mask=low < high, other=0) < values)
        low = tl.where(is_less, middle + 1, low)
        high = tl.where(is_less, high, middle)
    is_there = tl.load(list_ptr + low, mask=low < n, other=-2) == values
    return tl.where(is_there, low, -1)


@triton.jit(
    do_not_specialize=["table_stride_b", "n_table", "first_slot", "block_pages"],
    do_not_specialize_on_alignment=[
        *("table_ptr", "len_ptr", "n_wanted_ptr", "attended_ptr", "blocks_ptr", "n_read_ptr", "needs_ptr"),
        *("wanted_ptr", "held_ptr", "chosen_ptr", "slots_ptr", "chosen_for_ptr", "moved_ptr"),
    ],
)
def plan_kernel(
    wanted_ptr: tl.tensor,
    table_ptr: tl.tensor,
    len_ptr: tl.tensor,
    n_wanted_ptr: tl.tensor,
    attended_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    needs_ptr: tl.tensor,
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
    AHEAD: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """One program per (sequence, KV head): the pages it wants that no slot holds, each into a slot whose page it does not want,
    first into those that the running step does not read, in order. The same rule as ``working_set.planned_moves``.

    AHEAD: for the next step, while this one reads ``n_read`` of the pages chosen for it; else for KV heads in need.
    """
    b = tl.program_id(0)
    head = tl.program_id(1)
    row = b.to(tl.int64) * K + head
    rows_ptr += row * C * 3
    unread_ptr += row * C
    read_ptr += row * C
    tile = tl.arange(0, BLOCK)
    is_asked = tl.load(attended_ptr + b) > 0
    if AHEAD == 0:
        is_asked = is_asked & (tl.load(needs_ptr + row) != 0)
    if is_asked == 0:
        for start in range(0, C, BLOCK):
            i = start + tile
            tl.store(rows_ptr + 3 * i, tl.full([BLOCK], -1, tl.int64), mask=i < C)
            tl.store(unread_ptr + i, tl.zeros([BLOCK], tl.int64), mask=i < C)
            tl.store(read_ptr + i, tl.zeros([BLOCK], tl.int64), mask=i < C)
        return
    block = tl.load(blocks_ptr + b)
    n_wanted = tl.load(n_wanted_ptr + b)
    wanted_ptr += row * n_table
    held_ptr += (block * K + head) * S
    chosen_ptr += (block * K + head) * C
    slots_ptr += (block * K + head) * C
    places_ptr += row * C
    free_ptr += row * 2 * S
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
            is_read = place_in(chosen_ptr, tl.load(n_read_ptr + b), held, STEPS) >= 0
        unread = (is_free & (is_read == 0)).to(tl.int32)
        others = (is_free & is_read).to(tl.int32)
        tl.store(free_ptr + n_unread + tl.cumsum(unread) - 1, slot.to(tl.int64), mask=unread == 1)
        tl.store(free_ptr + S + n_others + tl.cumsum(others) - 1, slot.to(tl.int64), mask=others == 1)
        n_unread += tl.sum(unread, 0)
        n_others += tl.sum(others, 0)
    # Places and free slots are read by other threads than wrote them, and what is held and chosen is overwritten.
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
        host_page = tl.load(table_ptr + b * table_stride_b + page, mask=missing, other=-1)
        tl.store(rows_ptr + 3 * i, tl.where(missing, head, -1).to(tl.int64), mask=i < C)
        tl.store(rows_ptr + 3 * i + 1, host_page, mask=i < C)
        tl.store(rows_ptr + 3 * i + 2, block * block_pages + first_slot + slot, mask=i < C)
        tl.store(unread_ptr + i, (missing & (waits == 0)).to(tl.int64), mask=i < C)
        tl.store(read_ptr + i, waits.to(tl.int64), mask=i < C)
        n_missing += tl.sum(missing.to(tl.int32), 0)
    tl.store(chosen_for_ptr + block * K + head, tl.load(len_ptr + b) + AHEAD)
    moved_ptr += (block * K + head) * 2 + AHEAD
    tl.store(moved_ptr, tl.load(moved_ptr) + n_missing)


@triton.jit(
    do_not_specialize=["n_table", "sink_pages", "newest_pages", "first_slot", "block_pages"],
    do_not_specialize_on_alignment=["len_ptr", "n_chosen_ptr", "attended_ptr", "blocks_ptr", "slots_ptr", "head_table_ptr"],
)
def places_kernel(
    len_ptr: tl.tensor,
    n_chosen_ptr: tl.tensor,
    attended_ptr: tl.tensor,
    blocks_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    head_table_ptr: tl.tensor,
    n_table: tl.tensor,
    sink_pages: tl.tensor,
    newest_pages: tl.tensor,
    first_slot: tl.tensor,
    block_pages: tl.tensor,
    K: tl.constexpr,
    P: tl.constexpr,
    C: tl.constexpr,
    BLOCK_J: tl.constexpr,
) -> None:
    """One program per (sequence, KV head): the device pages it attends to, sinks, chosen ones and the newest, in order."""
    b = tl.program_id(0)
    head = tl.program_id(1)
    head_table_ptr += (b.to(tl.int64) * K + head) * n_table
    n_pages = tl.cdiv(tl.load(len_ptr + b), P).to(tl.int32)
    n_attended = tl.cdiv(tl.load(attended_ptr + b), P).to(tl.int32)
    n_chosen = tl.load(n_chosen_ptr + b).to(tl.int32)
    block = tl.load(blocks_ptr + b)
    for start in range(0, n_attended, BLOCK_J):
        i = start + tl.arange(0, BLOCK_J)
        is_chosen = (i >= sink_pages) & (i < sink_pages + n_chosen)
        slot = tl.load(slots_ptr + (block * K + head) * C + i - sink_pages, mask=is_chosen, other=0)
        others = own_page(tl.where(i < sink_pages, i, n_pages - n_attended + i), sink_pages, newest_pages)
        page = block * block_pages + tl.where(is_chosen, first_slot + slot, others)
        tl.store(head_table_ptr + i, page, mask=i < n_attended)
