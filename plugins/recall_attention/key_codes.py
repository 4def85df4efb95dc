"""Codes of keys: two bits per key and channel, which say where it lies between the page's bounds. Used by summary 2.

A bound is the product with a key that takes the best of each channel, which no key of the page may be like. With codes each
key is estimated, and a page is ranked by its best one. Codes per channel of a page are those of KIVI (arXiv 2402.02750). Only
the channels in which the query is largest are read, as in SparQ (arXiv 2312.04985); in the others keys count as the middle of
the bounds.

Rows of a page-head's summary: lo and hi, then for every eight tokens D bytes with the lower bits and D bytes with the upper
bits, in one row, or two if a row has no room for that. The first token is in a byte's lowest bit. Behind the last token its
bits are repeated.
"""

import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.kv_rows import KvDtype
from trt_kv.plugins.paging import Floats, Rows
from trt_kv.plugins.recall_attention.page_counts import CODED_TOKENS, CODES, summary_rows

LEVELS = 4


def levels_of(k_MKPD: Floats) -> NDArray[np.uint8]:
    """The levels [M, K, P, D] of keys of full pages: 0 where they are the smallest of their channel, 3 where the largest."""
    lo_MK1D, hi_MK1D = k_MKPD.min(axis=2, keepdims=True), k_MKPD.max(axis=2, keepdims=True)
    with np.errstate(invalid="ignore"):
        width_MK1D = np.where(hi_MK1D > lo_MK1D, hi_MK1D - lo_MK1D, np.float32(1))
    with np.errstate(invalid="ignore"):  # keys that are not finite have bounds that are not, whatever their level
        levels_MKPD = np.rint((k_MKPD - lo_MK1D) * np.float32(LEVELS - 1) / width_MK1D)
    levels: NDArray[np.uint8] = np.nan_to_num(levels_MKPD).clip(0, LEVELS - 1).astype(np.uint8)
    return levels


def with_codes(lo_hi_MK2W: Rows, k_MKPD: Floats, dtype: KvDtype) -> Rows:
    """Bounds, stored as rows of ``dtype``, and behind them the rows with the codes of the keys: [M, K, R, W]."""
    n_pages, n_kv_heads, page_size, head_size = k_MKPD.shape
    n_rows = summary_rows(CODES, page_size, dtype.name)
    rows: Rows = np.zeros((n_pages, n_kv_heads, n_rows, lo_hi_MK2W.shape[3]), lo_hi_MK2W.dtype)
    if not n_pages:
        return rows
    rows[:, :, :2] = lo_hi_MK2W
    beyond = ((0, 0), (0, 0), (0, -page_size % CODED_TOKENS), (0, 0))
    levels_MKETD = np.pad(levels_of(k_MKPD), beyond, mode="edge").reshape(n_pages, n_kv_heads, -1, CODED_TOKENS, head_size)
    bits_MKETBD = np.stack([levels_MKETD & 1, levels_MKETD >> 1], axis=4)
    codes_MKEB = np.packbits(bits_MKETBD, axis=3, bitorder="little").reshape(n_pages, n_kv_heads, -1, 2 * head_size)
    of_groups = rows.view(np.uint8).reshape(n_pages, n_kv_heads, n_rows, -1)[:, :, 2:].reshape(*codes_MKEB.shape[:3], -1)
    of_groups[..., : 2 * head_size] = codes_MKEB
    rows[:, :, 2:] = of_groups.reshape(n_pages, n_kv_heads, n_rows - 2, -1).view(rows.dtype)
    return rows
