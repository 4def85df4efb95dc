"""Which pages a KV head chooses, and when its choice is corrected: arithmetic shared by everything that recalls on a CPU.

Single-threaded and without the GIL, so that it can run in the background, and deterministic.
"""

import numpy as np
import numpy.typing as npt

from trt_kv.plugins.jit import njit
from trt_kv.plugins.kv_rows import KvDtype, load, number, scale_of, store
from trt_kv.plugins.paging import Floats, Ints, Rows

MAXIMUM = (1, 3)
"""Values of the attribute ``pooling`` that take the maximum over a group; the others take the mean."""


def cosines(q_HD: Floats, last_HD: Floats, n_kv_heads: int) -> npt.NDArray[np.float64]:
    """[K]: each KV head's mean over its query heads of cos(q, last); NaN if one of the vectors is zero (FreeKV, C_g)."""
    now_HD, last_HD = q_HD.astype(np.float64), last_HD.astype(np.float64)
    norms_H = np.sqrt((now_HD * now_HD).sum(axis=1)) * np.sqrt((last_HD * last_HD).sum(axis=1))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine_K: npt.NDArray[np.float64] = ((now_HD * last_HD).sum(axis=1) / norms_H).reshape(n_kv_heads, -1).mean(axis=1)
    return cosine_K


def drifted_heads(q_HD: Floats, last_HD: Floats, n_kv_heads: int, tau: float) -> np.ndarray:
    """[K] bool: KV heads whose queries' mean cosine with those before is not at least ``tau`` (FreeKV, C_g < tau)."""
    drifted: np.ndarray = ~(cosines(q_HD, last_HD, n_kv_heads) >= np.float32(tau))
    return drifted


def summaries_of(k_MKPW: Rows, summary: int, dtype: KvDtype) -> Rows:
    """lo and hi of the keys of full pages, both as rows of ``dtype``: [M, K, 2, W]."""
    k_MKPD = load(k_MKPW)
    lo_MKD, hi_MKD = k_MKPD.min(axis=2), k_MKPD.max(axis=2)
    if summary == 1:
        middle_MKD = (lo_MKD + hi_MKD) / np.float32(2)
        deviation_MKD = np.abs(k_MKPD - middle_MKD[:, :, None]).mean(axis=2)
        lo_MKD, hi_MKD = middle_MKD - deviation_MKD, middle_MKD + deviation_MKD
    return store(np.stack([lo_MKD, hi_MKD], axis=2), dtype)


def best_pages(probe_HD: Floats, pages_J: Ints, summaries: Rows, n_chosen: int, pooling: int, softmax_scale: float) -> Ints:
    """For each KV head the ``n_chosen`` best of the pool pages ``pages_J``, as ascending indices into ``pages_J``: [K, C]."""
    if n_chosen == 0 or n_chosen == len(pages_J):
        return np.tile(np.arange(n_chosen), (summaries.shape[1], 1))
    values_KJ = page_values(
        np.ascontiguousarray(probe_HD, np.float32),
        np.ascontiguousarray(pages_J),
        summaries,
        pooling < 2,
        pooling in MAXIMUM,
        np.float32(softmax_scale),
    )
    best_KC: Ints = _best(values_KJ, n_chosen)
    return best_KC


@njit(nogil=True, fastmath={"contract", "reassoc", "nsz", "arcp"})
def page_values(
    probe_HD: Floats, pages_J: Ints, summaries: Rows, softmax: bool, maximum: bool, softmax_scale: np.float32
) -> Floats:
    """[K, J] fp32: the values that each KV head ranks pages by; summaries are read once, in order, for a whole query group."""
    n_kv_heads, head_size = summaries.shape[1], probe_HD.shape[1]
    group = len(probe_HD) // n_kv_heads
    n_pages = len(pages_J)
    values_KJ = np.empty((n_kv_heads, n_pages), np.float32)
    bounds_KGJ = np.empty((n_kv_heads, group, n_pages), np.float32)
    for j in range(n_pages):
        page = pages_J[j]
        for head in range(n_kv_heads):
            lo_scale, hi_scale = scale_of(summaries[page, head, 0]), scale_of(summaries[page, head, 1])
            for g in range(group):
                bound = np.float32(0.0)
                for d in range(head_size):
                    x = probe_HD[head * group + g, d]
                    lo = lo_scale * number(summaries[page, head, 0, d])
                    hi = hi_scale * number(summaries[page, head, 1, d])
                    bound += max(x * lo, x * hi)
                bounds_KGJ[head, g, j] = bound
    for head in range(n_kv_heads):
        bounds_GJ = bounds_KGJ[head]
        if softmax:
            for g in range(group):
                largest = bounds_GJ[g].max()
                total = np.float32(0.0)
                for j in range(n_pages):
                    bounds_GJ[g, j] = np.exp(softmax_scale * (bounds_GJ[g, j] - largest))
                    total += bounds_GJ[g, j]
                for j in range(n_pages):
                    bounds_GJ[g, j] /= total
        for j in range(n_pages):
            pooled = bounds_GJ[0, j]
            for g in range(1, group):
                pooled = max(pooled, bounds_GJ[g, j]) if maximum else pooled + bounds_GJ[g, j]
            values_KJ[head, j] = pooled
    return values_KJ


@njit(nogil=True)
def _best(values_KJ: Floats, n_chosen: int) -> Ints:
    """Indices of each row's ``n_chosen`` largest values, ascending; among equal ones the lower index is chosen.

    NaN is chosen last. Values above the ``n_chosen``-th largest are chosen, and the first ones equal to it fill the rest, so
    nothing is sorted: at thousands of pages that took longer than computing their values.
    """
    n_pages = values_KJ.shape[1]
    chosen_KC = np.empty((len(values_KJ), n_chosen), np.int64)
    for head in range(len(values_KJ)):
        values_J = values_KJ[head]
        if np.isnan(values_J).any():
            order = np.argsort(-values_J, kind="mergesort")
            chosen_KC[head] = np.sort(order[:n_chosen])
            continue
        least = np.partition(values_J, n_pages - n_chosen)[n_pages - n_chosen]
        n_equal = n_chosen - (values_J > least).sum()
        at = 0
        for j in range(n_pages):
            is_equal = values_J[j] == least and n_equal > 0
            if is_equal or values_J[j] > least:
                chosen_KC[head, at] = j
                at += 1
                n_equal -= is_equal
    return chosen_KC
