"""What each query head gives each page on the GPU: bounds from summaries, or estimates from codes of keys.

H query heads, K KV heads, P page size, D head size, R rows of a summary.
"""

import torch
from torch import Tensor

from trt_kv.plugins.recall_attention.code_kernels import code_kernel, estimate_kernel
from trt_kv.plugins.recall_attention.page_counts import CODES, CODING, summary_rows
from trt_kv.plugins.recall_attention.rank_kernels import bound_kernel
from trt_kv.plugins.triton_launch import launch, n_processors, power_of_2

_BOUND_PAGES = 32
_BOUND_PROGRAMS = 4
"""Programs per SM, as many as fit on it, whatever the batch and the table's width: they end at once if nothing is wanted."""
_TILE_ROWS, _TILE_NUMBERS = 32, 2048
"""Of codes: each row of a tile is eight tokens of a page, and a tile has so many numbers at most."""
_CODED_QUERIES = 4
"""Query heads that a program estimates for, so that their queries stay in registers."""


def page_bounds(
    probe_BHD: Tensor, summaries: Tensor, table_BT: Tensor, between_B: Tensor, wanted_BK: Tensor, n_sinks: int
) -> Tensor:
    """Upper bounds of q.k for each query head and page, [B, H, T] fp32; only where there are more pages than wanted.

    With ``summaries`` [M, K, R, D] of more than two rows, which have codes: the largest estimate of q.k.
    """
    n_sequences, n_heads, head_size = probe_BHD.shape
    n_kv_heads, n_rows, n_table = summaries.shape[1], summaries.shape[2], table_BT.shape[1]
    bounds_BHT = torch.empty((n_sequences, n_heads, n_table), dtype=torch.float32, device=summaries.device)
    n_programs = -(-_BOUND_PROGRAMS * n_processors(summaries.device) // max(1, n_sequences * n_kv_heads))
    group = n_heads // n_kv_heads
    tile = {"BLOCK_J": _BOUND_PAGES} if n_rows == 2 else _code_tile(head_size, group, n_rows)
    n_parts = -(-group // tile.get("QUERIES", group))
    launch(
        bound_kernel if n_rows == 2 else estimate_kernel,
        (min(n_programs, -(-n_table // tile["BLOCK_J"])), n_sequences, n_kv_heads * n_parts),
        probe_ptr=probe_BHD,
        summaries_ptr=summaries,
        table_ptr=table_BT,
        between_ptr=between_B,
        wanted_ptr=wanted_BK,
        bounds_ptr=bounds_BHT,
        table_stride_b=table_BT.stride(0),
        wanted_stride_b=wanted_BK.stride(0),
        wanted_stride_k=wanted_BK.stride(1),
        n_table=n_table,
        sink_pages=n_sinks,
        H=n_heads,
        K=n_kv_heads,
        D=head_size,
        BLOCK_D=power_of_2(head_size),
        **tile,
    )
    return bounds_BHT


def _code_tile(head_size: int, group: int, n_rows: int) -> dict[str, int]:
    """What ``estimate_kernel`` takes besides: rows of a summary, channels whose codes count, and the shape of a tile."""
    n_tile = max(1, min(_TILE_ROWS, _TILE_NUMBERS // power_of_2(head_size)))
    block_e = min(n_tile, power_of_2(n_rows - 2))
    return {
        "ROWS": n_rows,
        "N_CODED": -(-head_size // CODING),
        "QUERIES": min(group, _CODED_QUERIES),
        "BLOCK_J": n_tile // block_e,
        "BLOCK_E": block_e,
    }


def coded_again(kv: Tensor, summaries: Tensor, table_BT: Tensor, kv_len_B: Tensor) -> Tensor:
    """Summaries [M, K, R, D] with codes of the full pages of sequences, from their keys, for a state that has no room for them.

    ``summaries`` [M, K, 2, D]: their bounds. Other pages are left uninitialised.
    """
    n_kv_heads, page_size, head_size = kv.shape[2:]
    n_rows = summary_rows(CODES, page_size, str(summaries.dtype).removeprefix("torch."))
    coded = torch.empty((*summaries.shape[:2], n_rows, head_size), dtype=summaries.dtype, device=summaries.device)
    launch(
        code_kernel,
        (table_BT.shape[1], len(kv_len_B), n_kv_heads),
        warps=1,
        table_ptr=table_BT,
        len_ptr=kv_len_B,
        kv_ptr=kv,
        bounds_ptr=summaries,
        coded_ptr=coded,
        table_stride_b=table_BT.stride(0),
        K=n_kv_heads,
        P=page_size,
        D=head_size,
        ROWS=n_rows,
        BLOCK_D=power_of_2(head_size),
        BLOCK_P=min(32, power_of_2(page_size)),
    )
    return coded
