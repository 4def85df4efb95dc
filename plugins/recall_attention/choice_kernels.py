"""The Triton functions that say of how many pages a sequence chooses how many, and which KV heads choose anew.

H query heads, K KV heads, G = H / K, P page size, D head size. ``choice_triton.py`` starts them.
"""

import triton
import triton.language as tl

from trt_kv.plugins.shares_triton import kept_of_share


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

    ``budget``: what was found for the sequence; if negative, the share and the tokens say it.
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
    """Whether the mean cosine of a group's queries, rows of ``x`` and ``y`` in fp32, reaches tau; never without an angle."""
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
    # Whatever thread holds an element: nothing is overwritten that is still to be read.
    tl.debug_barrier()
    tl.store(before_ptr + at, q, mask=mask)
