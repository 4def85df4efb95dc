"""Attention of a prompt's chunk over a cache on the host: block by block, so that memory does not grow with the context."""

from collections.abc import Callable, Iterator

import numpy as np

from trt_kv.plugins.adaptive_budget.cpu import attention_row
from trt_kv.plugins.attention_cpu import attend_chunk
from trt_kv.plugins.paging import Floats, Ints, Rows

BLOCK_TOKENS = 4096
"""Tokens of the cache that are read at a time."""

ReadPages = Callable[[Ints], Rows]


def attend_prompt(
    q_NHD: Floats,
    n_cached: int,
    earlier_pages: Ints,
    block: Rows,
    read_pages: ReadPages,
    *,
    scale: float,
    soft_cap: float = 0.0,
) -> tuple[Floats, Floats]:
    """Causal attention of the last N of ``n_cached`` tokens: (out [N, H, D], lse [N, H]), fp32.

    ``earlier_pages`` are full and are read by ``read_pages``; ``block`` [n, 2, K, P, W] holds the pages after them. Blocks are
    merged by their log-sum-exps (FlashAttention, arXiv 2205.14135, section 3.1). If everything fits into one block, the result
    is bit-identical to attention over the whole cache.
    """
    page_size = block.shape[3]
    n_earlier = len(earlier_pages) * page_size
    positions_N = np.arange(n_cached - len(q_NHD), n_cached)
    if n_cached <= BLOCK_TOKENS:
        pages = np.concatenate([read_pages(earlier_pages), block]) if len(earlier_pages) else block
        return _attend(q_NHD, positions_N, pages, range(n_cached), scale, soft_cap)
    out, lse = _attend(q_NHD, positions_N, block, range(n_earlier, n_cached), scale, soft_cap)
    n_read = 0
    for pages in blocks_of(earlier_pages, page_size):
        tokens = range(n_read, n_read + len(pages) * page_size)
        out, lse = joined(out, lse, *_attend(q_NHD, positions_N, read_pages(pages), tokens, scale, soft_cap))
        n_read = tokens.stop
    return out, lse


def _attend(
    q_NHD: Floats, positions_N: Ints, pages: Rows, tokens: range, scale: float, soft_cap: float
) -> tuple[Floats, Floats]:
    """``attend_chunk`` to the tokens at the positions ``tokens``, which fill ``pages`` [n, 2, K, P, W] in order."""
    positions_KS = np.tile(np.arange(tokens.start, tokens.stop), (pages.shape[2], 1))
    return attend_chunk(q_NHD, positions_N, np.arange(len(pages)), pages, positions_KS, scale, soft_cap=soft_cap)


def joined(out: Floats, lse: Floats, more: Floats, more_lse: Floats) -> tuple[Floats, Floats]:
    """Merge the attention over two sets of tokens by their log-sum-exps."""
    both = np.logaddexp(lse, more_lse)
    return out * np.exp(lse - both)[..., None] + more * np.exp(more_lse - both)[..., None], both


def last_query_row(
    q_HD: Floats,
    lse_H: Floats,
    n_cached: int,
    pages: Ints,
    open_page: Rows,
    read_pages: ReadPages,
    *,
    scale: float,
    soft_cap: float = 0.0,
) -> Floats:
    """Attention weights of one query for every token: [H, S] fp64. ``open_page`` [1, 2, K, P, W] follows ``pages``."""
    size, of_logits = open_page.shape[3], (np.float32(scale), np.float32(soft_cap))
    rows = [
        attention_row(q_HD, lse_H, np.arange(len(part)), len(part) * size, read_pages(part), *of_logits)
        for part in blocks_of(pages, size)
    ]
    n_open = n_cached - len(pages) * size
    rows += [attention_row(q_HD, lse_H, np.zeros(1, np.int64), n_open, open_page, *of_logits)] if n_open else []
    return np.concatenate(rows, axis=1)


def blocks_of(pages: Ints, page_size: int) -> Iterator[Ints]:
    """The pages in blocks of at most ``BLOCK_TOKENS`` tokens."""
    size = max(1, BLOCK_TOKENS // page_size)
    for first in range(0, len(pages), size):
        yield pages[first : first + size]
