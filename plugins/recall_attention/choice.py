"""Which pages a KV head chooses, and when its choice is corrected: arithmetic shared by everything that recalls on a CPU.

Deterministic, however many threads run it.
"""

import numba
import numpy as np
import numpy.typing as npt

from trt_kv.plugins.jit import njit
from trt_kv.plugins.kv_rows import KvDtype, load, number, scale_of, store
from trt_kv.plugins.paging import Floats, Ints, Rows
from trt_kv.plugins.recall_attention.key_codes import LEVELS, with_codes
from trt_kv.plugins.recall_attention.page_counts import CODED_TOKENS, CODES, CODING
from trt_kv.plugins.vector_codes import CODED_HEADS, code_sums

MAXIMUM = (1, 3)
"""Values of the attribute ``pooling`` that take the maximum over a group; the others take the mean."""

BLOCK_PAGES = 256
"""Pages that a thread ranks at a time."""

WORTH_THREADS = 2**17
"""Numbers in summaries (of one of the two bounds) from which on it is worth waking a sleeping thread."""


def cosines(q_HD: Floats, last_HD: Floats, n_kv_heads: int) -> npt.NDArray[np.float64]:
    """[K]: each KV head's mean over its query heads of cos(q, last); NaN if one of the vectors is zero (FreeKV, C_g)."""
    found_K: npt.NDArray[np.float64] = _cosines(np.asarray(q_HD, np.float32), np.asarray(last_HD, np.float32), n_kv_heads)
    return found_K


def drifted_heads(q_HD: Floats, last_HD: Floats, n_kv_heads: int, tau: float) -> np.ndarray:
    """[K] bool: KV heads whose queries' mean cosine with those before is not at least ``tau`` (FreeKV, C_g < tau)."""
    drifted: np.ndarray = ~(cosines(q_HD, last_HD, n_kv_heads) >= np.float32(tau))
    return drifted


@njit(nogil=True)
def probes_of(
    q_NHD: Floats, rows_B: Ints, last_UHD: Floats, query_rows_B: Ints, n_kv_heads: int, tau: np.float32
) -> tuple[npt.NDArray[np.bool_], Floats]:
    """Which KV heads drifted, [B, K], and the queries to choose pages with, [B, H, D]: those of row ``rows_B[b]`` of ``q_NHD``
    for heads that did, those of row ``query_rows_B[b]`` of ``last_UHD`` for the others.
    """
    group = q_NHD.shape[1] // n_kv_heads
    drifted_BK = np.empty((len(rows_B), n_kv_heads), np.bool_)
    probe_BHD = np.empty((len(rows_B), *q_NHD.shape[1:]), np.float32)
    for b in range(len(rows_B)):
        q_HD, last_HD = q_NHD[rows_B[b]], last_UHD[query_rows_B[b]]
        cosine_K = _cosines(q_HD, last_HD, n_kv_heads)
        for head in range(n_kv_heads):
            drifted_BK[b, head] = not cosine_K[head] >= tau
            heads = slice(head * group, (head + 1) * group)
            probe_BHD[b, heads] = q_HD[heads] if drifted_BK[b, head] else last_HD[heads]
    return drifted_BK, probe_BHD


@njit(nogil=True)
def _cosines(q_HD: Floats, last_HD: Floats, n_kv_heads: int) -> npt.NDArray[np.float64]:
    group = len(q_HD) // n_kv_heads
    cosine_K = np.empty(n_kv_heads, np.float64)
    for head in range(n_kv_heads):
        total = 0.0
        for h in range(head * group, (head + 1) * group):
            product = squares = last_squares = 0.0
            for d in range(q_HD.shape[1]):
                now, before = np.float64(q_HD[h, d]), np.float64(last_HD[h, d])
                product += now * before
                squares += now * now
                last_squares += before * before
            norms = np.sqrt(squares) * np.sqrt(last_squares)
            total += product / norms if norms > 0.0 else np.nan
        cosine_K[head] = total / group
    return cosine_K


def summaries_of(k_MKPW: Rows, summary: int, dtype: KvDtype) -> Rows:
    """lo and hi of the keys of full pages, as rows of ``dtype``: [M, K, 2, W]; with codes (2) more rows, which hold these."""
    k_MKPD = load(k_MKPW)
    lo_MKD, hi_MKD = k_MKPD.min(axis=2), k_MKPD.max(axis=2)
    if summary == 1:
        middle_MKD = (lo_MKD + hi_MKD) / np.float32(2)
        deviation_MKD = np.abs(k_MKPD - middle_MKD[:, :, None]).mean(axis=2)
        lo_MKD, hi_MKD = middle_MKD - deviation_MKD, middle_MKD + deviation_MKD
    lo_hi_MK2W = store(np.stack([lo_MKD, hi_MKD], axis=2), dtype)
    return with_codes(lo_hi_MK2W, k_MKPD, dtype) if summary == CODES else lo_hi_MK2W


def best_pages(probe_HD: Floats, pages_J: Ints, summaries: Rows, n_chosen: int, pooling: int, softmax_scale: float) -> Ints:
    """For each KV head the ``n_chosen`` best of the pool pages ``pages_J``, as ascending indices into ``pages_J``: [K, C]."""
    first_B, n_between_B, n_chosen_B = np.array([0, len(pages_J), n_chosen])[:, None]
    chosen_BKC = choose_pages(
        probe_HD[None], pages_J[None], first_B, n_between_B, n_chosen_B, summaries, pooling, softmax_scale
    )
    best_KC: Ints = chosen_BKC[0]
    return best_KC


def choose_pages(
    probe_BHD: Floats,
    page_table_BT: Ints,
    first_B: Ints,
    n_between_B: Ints,
    n_chosen_B: Ints,
    summaries: Rows,
    pooling: int,
    softmax_scale: float,
) -> Ints:
    """The pages that each KV head chooses for its queries ``probe_BHD``, as ascending page numbers: [B, K, C].

    Sequence b chooses ``n_chosen_B[b]`` of the ``n_between_B[b]`` pages from number ``first_B[b]`` on; C is the most of any
    sequence, and what is beyond a sequence's own is undefined. Summaries are read by several threads if there are many. Those
    with more than two rows have codes.
    """
    n_sequences, n_heads, head_size = probe_BHD.shape
    n_kv_heads, widest = summaries.shape[1], int(n_between_B.max())
    chosen_BKC = np.empty((n_sequences, n_kv_heads, int(n_chosen_B.max())), np.int64)
    _choose(
        np.asarray(probe_BHD, np.float32, order="C"),
        *(page_table_BT, first_B, n_between_B, n_chosen_B, summaries),
        *(pooling < 2, pooling in MAXIMUM, np.float32(softmax_scale)),
        -(-widest // BLOCK_PAGES),
        n_sequences * widest * n_kv_heads * head_size >= WORTH_THREADS,
        np.empty((n_sequences, n_heads, widest), np.float32),
        chosen_BKC,
    )
    return chosen_BKC


@njit(nogil=True, parallel=True)
def _choose(
    probe_BHD: Floats,
    page_table_BT: Ints,
    first_B: Ints,
    n_between_B: Ints,
    n_chosen_B: Ints,
    summaries: Rows,
    softmax: bool,
    maximum: bool,
    softmax_scale: np.float32,
    n_blocks: int,
    in_threads: bool,
    bounds_BHJ: Floats,
    chosen_BKC: Ints,
) -> None:
    n_sequences, n_kv_heads = chosen_BKC.shape[:2]
    if not in_threads:
        for b in range(n_sequences):
            for block in range(n_blocks):
                _bound_block(b, block, probe_BHD, page_table_BT, first_B, n_between_B, n_chosen_B, summaries, bounds_BHJ)
            for head in range(n_kv_heads):
                _choose_for_head(
                    b, head, first_B, n_between_B, n_chosen_B, bounds_BHJ, softmax, maximum, softmax_scale, chosen_BKC
                )
    else:
        for task in numba.prange(n_sequences * n_blocks):
            b, block = task // n_blocks, task % n_blocks
            _bound_block(b, block, probe_BHD, page_table_BT, first_B, n_between_B, n_chosen_B, summaries, bounds_BHJ)
        for task in numba.prange(n_sequences * n_kv_heads):
            b, head = task // n_kv_heads, task % n_kv_heads
            _choose_for_head(b, head, first_B, n_between_B, n_chosen_B, bounds_BHJ, softmax, maximum, softmax_scale, chosen_BKC)


@njit(nogil=True, fastmath={"contract", "reassoc", "nsz", "arcp"})
def _bound_block(
    b: int,
    block: int,
    probe_BHD: Floats,
    page_table_BT: Ints,
    first_B: Ints,
    n_between_B: Ints,
    n_chosen_B: Ints,
    summaries: Rows,
    bounds_BHJ: Floats,
) -> None:
    """The bounds of a block of pages, if there is something to choose; a page's summaries are read once for all heads."""
    if n_chosen_B[b] <= 0 or n_chosen_B[b] >= n_between_B[b]:
        return
    if summaries.shape[2] > 2:
        _estimate_block(b, block, probe_BHD, page_table_BT, first_B, n_between_B, summaries, bounds_BHJ)
        return
    n_kv_heads, head_size = summaries.shape[1], probe_BHD.shape[2]
    group = probe_BHD.shape[1] // n_kv_heads
    for j in range(block * BLOCK_PAGES, min((block + 1) * BLOCK_PAGES, n_between_B[b])):
        page = page_table_BT[b, first_B[b] + j]
        for head in range(n_kv_heads):
            lo_W, hi_W = summaries[page, head, 0], summaries[page, head, 1]
            lo_scale, hi_scale = scale_of(lo_W), scale_of(hi_W)
            for h in range(head * group, (head + 1) * group):
                bound = np.float32(0.0)
                for d in range(head_size):
                    x = probe_BHD[b, h, d]
                    bound += max(x * (lo_scale * number(lo_W[d])), x * (hi_scale * number(hi_W[d])))
                bounds_BHJ[b, h, j] = bound


@njit(nogil=True, fastmath={"contract", "reassoc", "nsz", "arcp"})
def _estimate_block(
    b: int,
    block: int,
    probe_BHD: Floats,
    page_table_BT: Ints,
    first_B: Ints,
    n_between_B: Ints,
    summaries: Rows,
    bounds_BHJ: Floats,
) -> None:
    """As ``_bound_block``, with the largest estimate of a page's keys in place of a bound."""
    n_kv_heads, head_size = summaries.shape[1], probe_BHD.shape[2]
    group = probe_BHD.shape[1] // n_kv_heads
    n_coded = (head_size + CODING - 1) // CODING
    channels_KR = _coded_channels(probe_BHD[b], n_kv_heads, n_coded)
    place_KD = np.full((n_kv_heads, head_size), 0.5, np.float32)
    for head in range(n_kv_heads):
        for channel in channels_KR[head]:
            place_KD[head, channel] = 0.0
    weights = np.empty(CODED_HEADS * n_coded, np.float32)
    sums = np.empty(CODED_HEADS * CODED_TOKENS, np.float32)
    base_G = np.empty(CODED_HEADS, np.float32)
    row_bytes, rows_per_group = summaries.shape[3] * summaries.itemsize, 2 if summaries.itemsize == 1 else 1
    for j in range(block * BLOCK_PAGES, min((block + 1) * BLOCK_PAGES, n_between_B[b])):
        page = page_table_BT[b, first_B[b] + j]
        for head in range(n_kv_heads):
            lo_W, hi_W = summaries[page, head, 0], summaries[page, head, 1]
            lo_scale, hi_scale = scale_of(lo_W), scale_of(hi_W)
            first_row = (page * n_kv_heads + head) * summaries.shape[2]
            for begin in range(head * group, (head + 1) * group, CODED_HEADS):
                n_heads = min(CODED_HEADS, (head + 1) * group - begin)
                for g in range(n_heads):
                    base = np.float32(0.0)
                    for d in range(head_size):
                        lo, hi = lo_scale * number(lo_W[d]), hi_scale * number(hi_W[d])
                        base += probe_BHD[b, begin + g, d] * (lo + place_KD[head, d] * (hi - lo))
                    for i in range(n_coded):
                        d = channels_KR[head, i]
                        width = hi_scale * number(hi_W[d]) - lo_scale * number(lo_W[d])
                        weights[g * n_coded + i] = probe_BHD[b, begin + g, d] * width / np.float32(LEVELS - 1)
                    base_G[g] = base
                    bounds_BHJ[b, begin + g, j] = -np.inf
                for row in range(2, summaries.shape[2], rows_per_group):
                    at = (first_row + row) * row_bytes
                    code_sums(weights, n_heads, channels_KR[head], n_coded, head_size, summaries, at, sums)
                    for g in range(n_heads):
                        largest = sums[g * CODED_TOKENS]
                        for t in range(1, CODED_TOKENS):
                            largest = max(largest, sums[g * CODED_TOKENS + t])
                        bounds_BHJ[b, begin + g, j] = max(bounds_BHJ[b, begin + g, j], base_G[g] + largest)


@njit(nogil=True)
def _coded_channels(probe_HD: Floats, n_kv_heads: int, n_coded: int) -> Ints:
    """[K, R]: the channels in which the queries of each KV head are largest, by the sum of their squares, ascending."""
    group = len(probe_HD) // n_kv_heads
    channels_KR = np.empty((n_kv_heads, n_coded), np.int64)
    for head in range(n_kv_heads):
        squares_D = np.zeros(probe_HD.shape[1], np.float32)
        for h in range(head * group, (head + 1) * group):
            for d in range(probe_HD.shape[1]):
                squares_D[d] += probe_HD[h, d] * probe_HD[h, d]
        channels_KR[head] = np.sort(np.argsort(-squares_D, kind="mergesort")[:n_coded])
    return channels_KR


@njit(nogil=True, fastmath={"contract", "reassoc", "nsz", "arcp"})
def _choose_for_head(
    b: int,
    head: int,
    first_B: Ints,
    n_between_B: Ints,
    n_chosen_B: Ints,
    bounds_BHJ: Floats,
    softmax: bool,
    maximum: bool,
    softmax_scale: np.float32,
    chosen_BKC: Ints,
) -> None:
    """One value per page from the bounds of a KV head's query heads, then the best pages."""
    n_pages, n_chosen = n_between_B[b], n_chosen_B[b]
    if n_chosen <= 0:
        return
    if n_chosen >= n_pages:
        chosen_BKC[b, head, :n_pages] = np.arange(first_B[b], first_B[b] + n_pages)
        return
    group = bounds_BHJ.shape[1] // chosen_BKC.shape[1]
    bounds_GJ = bounds_BHJ[b, head * group : (head + 1) * group, :n_pages]
    if softmax:
        for g in range(group):
            largest = bounds_GJ[g].max()
            total = np.float32(0.0)
            for j in range(n_pages):
                bounds_GJ[g, j] = np.exp(softmax_scale * (bounds_GJ[g, j] - largest))
                total += bounds_GJ[g, j]
            for j in range(n_pages):
                bounds_GJ[g, j] /= total
    values_J = bounds_GJ[0]
    for g in range(1, group):
        for j in range(n_pages):
            values_J[j] = max(values_J[j], bounds_GJ[g, j]) if maximum else values_J[j] + bounds_GJ[g, j]
    _best(values_J, first_B[b], chosen_BKC[b, head, :n_chosen])


@njit(nogil=True)
def _best(values_J: Floats, first: int, chosen_C: Ints) -> None:
    """Fill ``chosen_C`` with ``first`` + the indices of the C largest values, ascending; among equal ones the lower index is
    chosen.

    NaN is chosen last. Values above the C-th largest are chosen, and the first ones equal to it fill the rest, so nothing is
    sorted: at thousands of pages that took longer than computing their values.
    """
    n_pages, n_chosen = len(values_J), len(chosen_C)
    if np.isnan(values_J).any():
        order = np.argsort(-values_J, kind="mergesort")
        chosen_C[:] = first + np.sort(order[:n_chosen])
        return
    least = np.partition(values_J, n_pages - n_chosen)[n_pages - n_chosen]
    n_equal = n_chosen - (values_J > least).sum()
    at = 0
    for j in range(n_pages):
        is_equal = values_J[j] == least and n_equal > 0
        if is_equal or values_J[j] > least:
            chosen_C[at] = first + j
            at += 1
            n_equal -= is_equal
