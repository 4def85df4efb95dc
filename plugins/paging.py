"""Reading and writing one sequence's cached tokens through its page table."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.kv_rows import load

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]
Rows = NDArray[Any]
"""Stored rows of a KV cache (``kv_rows``)."""


def capped(logits: Floats, soft_cap: float) -> Floats:
    """c * tanh(x / c) of each logit, in its own type; the logits themselves if c is 0."""
    return logits.dtype.type(soft_cap) * np.tanh(logits / logits.dtype.type(soft_cap)) if soft_cap else logits


def pages_of(page_table: Ints, layer: int, sequence: int | np.integer[Any], n_tokens: int, page_size: int) -> Ints:
    """The pages that hold the sequence's first ``n_tokens`` cached tokens, in order: [ceil(n_tokens / P)] int64."""
    return page_table[layer, sequence, : -(-n_tokens // page_size)]


def gather_kv(kv: Rows, pages: Ints, n_tokens: int) -> tuple[Floats, Floats]:
    """Copies of K and V in fp32, each [K, S, D], of the first ``n_tokens`` slots of ``pages``; kv is [M, 2, K, P, W]."""
    kv_2KTPW = kv[pages].transpose(1, 2, 0, 3, 4)
    kv_2KSD = load(kv_2KTPW.reshape(2, kv.shape[2], -1, kv.shape[4])[:, :, :n_tokens])
    return kv_2KSD[0], kv_2KSD[1]


def gather_slots(pool_MKP: NDArray[Any], pages: Ints, n_tokens: int) -> NDArray[Any]:
    """A contiguous copy [K, S] of the first ``n_tokens`` slots of ``pages`` of a per-slot pool [M, K, P]."""
    pool_KTP = pool_MKP[pages].transpose(1, 0, 2)
    return np.ascontiguousarray(pool_KTP.reshape(pool_MKP.shape[1], -1)[:, :n_tokens])


def scatter_slots(pool_MKP: NDArray[Any], pages: Ints, values_KS: NDArray[Any]) -> None:
    """Write ``values_KS`` to the first S slots of ``pages``; the slots behind them keep their content."""
    n_kv_heads, page_size = pool_MKP.shape[1:]
    full, rest = divmod(values_KS.shape[1], page_size)
    values_KTP = values_KS[:, : full * page_size].reshape(n_kv_heads, full, page_size)
    pool_MKP[pages[:full]] = values_KTP.transpose(1, 0, 2)
    if rest:
        pool_MKP[pages[full], :, :rest] = values_KS[:, full * page_size :]


def head_groups(positions_KS: Ints) -> list[slice]:
    """Groups of KV heads that share a visibility mask: one group if every slot holds the same token in all heads, as it does
    until tokens are evicted by a ranking per head; else a group per head.
    """
    n_kv_heads = len(positions_KS)
    if (positions_KS[1:] == positions_KS[0]).all():
        return [slice(0, n_kv_heads)]
    return [slice(head, head + 1) for head in range(n_kv_heads)]
