"""Attention on the GPU, shared by the ops that attend: appending, one query over pages in place, a chunk of queries.

Which sequences decode and which prefill is known on the device only, so both attention kernels are launched, and each skips the
other's sequences. Why, and how work is divided: docs/decisions/0019-triton-kernels.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trt_kv.plugins.attention_kernels import append_kernel, chunk_kernel, combine_kernel, decode_kernel
from trt_kv.plugins.triton_launch import launch, n_processors, power_of_2

_SPLIT_TOKENS = 256
"""Smallest part that a sequence is divided into, in tokens, if it fills its page table."""
_LOG2_E = 1.4426950408889634


def append_tokens(
    kv: Tensor, token_positions: Tensor, slots_N: Tensor, k_NKD: Tensor, v_NKD: Tensor, positions_N: Tensor
) -> None:
    """Write this step's tokens to their slots, the same in all KV heads."""
    n_kv_heads, page_size, head_size = kv.shape[2:]
    launch(
        append_kernel,
        (len(k_NKD),),
        k_ptr=k_NKD.contiguous(),
        v_ptr=v_NKD.contiguous(),
        positions_ptr=positions_N,
        slots_ptr=slots_N,
        kv_ptr=kv,
        token_positions_ptr=token_positions,
        K=n_kv_heads,
        P=page_size,
        D=head_size,
        BLOCK=power_of_2(n_kv_heads * head_size),
        BLOCK_K=power_of_2(n_kv_heads),
    )


@dataclass(frozen=True, kw_only=True)
class Window:
    """A query sees the last ``size`` positions up to its own, which is in ``positions_N``; of slots, in ``token_positions``."""

    size: int
    positions_N: Tensor
    token_positions: Tensor


def attend_one(
    q_NHD: Tensor,
    cu_tokens: Tensor,
    table_BKT: Tensor,
    kv_len_B: Tensor,
    kv: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    *,
    soft_cap: float = 0.0,
    window: Window | None = None,
) -> None:
    """The query of each sequence that has one token in this step attends to the first ``kv_len_B[b]`` tokens of its pages,
    all of which are visible to it, unless they are outside of ``window``: rows of ``out`` [N, H, D] and ``lse`` [N, H].
    Sequences of length 0 are skipped.

    ``table_BKT`` holds pages of each KV head (axis K may be expanded); entries beyond the last page are not read.
    """
    n_heads = q_NHD.shape[1]
    n_kv_heads, page_size, head_size = kv.shape[2:]
    n_sequences = len(kv_len_B)
    n_splits = _n_splits(n_sequences * n_kv_heads, table_BKT.shape[2] * page_size, n_processors(kv.device))
    parts, lse_parts = out, lse
    if n_splits > 1:
        parts = torch.empty((n_sequences, n_heads, n_splits, head_size), dtype=torch.float32, device=kv.device)
        lse_parts = torch.empty((n_sequences, n_heads, n_splits), dtype=torch.float32, device=kv.device)
    sizes = {"H": n_heads, "D": head_size, "BLOCK_D": max(16, power_of_2(head_size)), "SPLITS": n_splits}
    launch(
        decode_kernel,
        (n_sequences, n_kv_heads, n_splits),
        stages=2 if kv.itemsize == 2 else 1,
        q_ptr=q_NHD,
        # Without a window nothing reads positions.
        positions_ptr=cu_tokens if window is None else window.positions_N,
        cu_ptr=cu_tokens,
        table_ptr=table_BKT,
        len_ptr=kv_len_B,
        kv_ptr=kv,
        token_positions_ptr=cu_tokens if window is None else window.token_positions,
        out_ptr=parts,
        lse_ptr=lse_parts,
        scale=scale,
        soft_cap=float(soft_cap),
        table_stride_b=table_BKT.stride(0),
        table_stride_k=table_BKT.stride(1),
        window=0 if window is None else window.size,
        CAPPED=int(soft_cap > 0),
        WINDOWED=int(window is not None),
        K=n_kv_heads,
        P=page_size,
        BLOCK_G=max(16, power_of_2(n_heads // n_kv_heads)),
        BLOCK_S=_decode_tile(kv.itemsize, head_size),
        LOG2_E=_LOG2_E,
        **sizes,
    )
    if n_splits > 1:
        launch(
            combine_kernel,
            (n_sequences, n_heads),
            part_out_ptr=parts,
            part_lse_ptr=lse_parts,
            cu_ptr=cu_tokens,
            len_ptr=kv_len_B,
            out_ptr=out,
            lse_ptr=lse,
            **sizes,
        )


def _decode_tile(itemsize: int, head_size: int) -> int:
    """Tokens that a program of ``decode_kernel`` reads at a time: 32 KiB of keys, so that two programs fit on any GPU's SM."""
    return (128 if head_size <= 128 else 64) if itemsize == 2 else 32


def _n_splits(n_tasks: int, table_tokens: int, processors: int) -> int:
    """The number of parts each sequence's tokens are divided into, from shapes alone: at most two programs per SM, so that all
    of them run at the same time. A few programs in a second wave would double the time.
    """
    wanted = min(2 * processors // max(1, n_tasks), table_tokens // _SPLIT_TOKENS)
    return min(64, 1 << max(0, wanted.bit_length() - 1))


def attend_chunks(
    q_NHD: Tensor,
    positions_N: Tensor,
    cu_tokens: Tensor,
    table_BT: Tensor,
    kv_len_B: Tensor,
    kv: Tensor,
    token_positions: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    *,
    min_new: int,
    soft_cap: float = 0.0,
    window: int = 0,
) -> None:
    """Every query of a sequence that has at least ``min_new`` tokens in this step attends to those of the sequence's first
    ``kv_len_B[b]`` tokens at positions up to its own, with a ``window`` to the last ones of these: rows of ``out`` and ``lse``.
    Sequences of length 0 are skipped.
    """
    n_tokens, n_heads, _ = q_NHD.shape
    n_kv_heads, page_size, head_size = kv.shape[2:]
    group = n_heads // n_kv_heads
    block = max(128 if kv.itemsize == 2 else 16, power_of_2(group))
    launch(
        chunk_kernel,
        (n_tokens // (block // group) + len(kv_len_B), n_kv_heads),
        warps=8 if kv.itemsize == 2 else 4,
        stages=2 if kv.itemsize == 2 else 1,
        q_ptr=q_NHD,
        positions_ptr=positions_N,
        cu_ptr=cu_tokens,
        table_ptr=table_BT,
        len_ptr=kv_len_B,
        kv_ptr=kv,
        token_positions_ptr=token_positions,
        out_ptr=out,
        lse_ptr=lse,
        scale=scale,
        soft_cap=float(soft_cap),
        table_stride_b=table_BT.stride(0),
        n_sequences=len(kv_len_B),
        min_new=min_new,
        window=window,
        CAPPED=int(soft_cap > 0),
        WINDOWED=int(window > 0),
        H=n_heads,
        K=n_kv_heads,
        P=page_size,
        D=head_size,
        BLOCK_D=max(16, power_of_2(head_size)),
        BLOCK_M=block,
        BLOCK_S=64 if kv.itemsize == 2 else 32,
        LOG2_E=_LOG2_E,
    )
