"""Reading and writing one sequence's cached tokens through its page table."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.int64]


def pages_of(page_table: Ints, layer: int, sequence: int | np.integer[Any], n_tokens: int, page_size: int) -> Ints:
    """The pages that hold the sequence's first ``n_tokens`` cached tokens, in order: [ceil(n_tokens / P)] int64."""
    return page_table[layer, sequence, : -(-n_tokens // page_size)]


def gather_kv(kv: Floats, pages: Ints, n_tokens: int) -> tuple[Floats, Floats]:
    """Contiguous copies of K and V, each [K, S, D], of the first ``n_tokens`` slots of ``pages``; kv is [M, 2, K, P, D]."""
    kv_2KTPD = kv[pages].transpose(1, 2, 0, 3, 4)
    kv_2KSD = kv_2KTPD.reshape(2, kv.shape[2], -1, kv.shape[4])[:, :, :n_tokens]
    return kv_2KSD[0], kv_2KSD[1]


def gather_slots(pool_MP: NDArray[Any], pages: Ints, n_tokens: int) -> NDArray[Any]:
    """A copy [S] of a per-slot pool [M, P]."""
    return pool_MP[pages].reshape(-1)[:n_tokens]


def scatter_slots(pool_MP: NDArray[Any], pages: Ints, values: NDArray[Any]) -> None:
    """Write ``values`` [S] to the first S slots of ``pages``; the slots behind them keep their content."""
    page_size = pool_MP.shape[1]
    full = len(values) // page_size
    pool_MP[pages[:full]] = values[: full * page_size].reshape(full, page_size)
    if rest := len(values) - full * page_size:
        pool_MP[pages[full], :rest] = values[full * page_size :]
