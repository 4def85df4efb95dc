"""The Triton functions that sum pages up: for each KV head, what bounds its keys from below and above.

K KV heads, P page size, D head size.
"""

import triton
import triton.language as tl

from trt_kv.plugins.attention_kernels import sequence_of_tile


@triton.jit
def summarise(
    keys_ptr: tl.tensor,
    to_ptr: tl.tensor,
    P: tl.constexpr,
    D: tl.constexpr,
    DEVIATION: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """Write what bounds one KV head's keys [P, D] of a page from below and above, [2, D]."""
    d = tl.arange(0, BLOCK_D)
    lo = tl.full([BLOCK_D], float("inf"), tl.float32)
    hi = tl.full([BLOCK_D], float("-inf"), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < P)[:, None] & (d < D)[None, :]
        k = tl.load(keys_ptr + p[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        lo = tl.minimum(lo, tl.min(tl.where(mask, k, float("inf")), 0))
        hi = tl.maximum(hi, tl.max(tl.where(mask, k, float("-inf")), 0))
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
    summarise(
        kv_ptr + (page * 2 * K + head) * P * D, summaries_ptr + (page * K + head) * 2 * D, P, D, DEVIATION, BLOCK_D, BLOCK_P
    )
