"""EvictTokens on the CPU: one sort of the scores, one gather of the survivors."""

import numpy as np

from trt_kv.plugins.paging import Floats, Ints, gather_slots, pages_of, scatter_slots
from trt_kv.policy import kept_tokens


def run(
    *,
    evict: Ints,
    page_table: Ints,
    kv_len: Ints,
    kv: Floats,
    token_positions: Ints,
    scores: Floats,
    layer: int,
    page_size: int,
    kept_share: float,
    sinks: int = 1,
    recent: int = 1,
    budget: Ints | None = None,
) -> tuple[Ints]:
    """Spec: ``spec.py``. Returns (kept [B],); updates kv, token_positions and scores in place."""
    kept = kv_len[layer].copy()
    for b in np.flatnonzero(evict):
        n_cached = int(kv_len[layer, b])
        pages = pages_of(page_table, layer, b, n_cached, page_size)
        positions_S = gather_slots(token_positions, pages, n_cached)
        scores_S = gather_slots(scores, pages, n_cached)
        target = kept_tokens(n_cached, kept_share) if budget is None else int(budget[b])
        survivors = surviving_slots(positions_S, scores_S, target, sinks, recent)
        pages_C = pages[survivors // page_size]
        offsets_C = survivors % page_size
        target_pages = pages[np.arange(len(survivors)) // page_size]
        kv[target_pages, :, :, np.arange(len(survivors)) % page_size] = kv[pages_C, :, :, offsets_C]
        scatter_slots(token_positions, pages, positions_S[survivors])
        scatter_slots(scores, pages, scores_S[survivors])
        kept[b] = len(survivors)
    return (kept,)


def surviving_slots(positions_S: Ints, scores_S: Floats, target: int, sinks: int, recent: int) -> Ints:
    """Indices into the sequence's slots of the tokens that stay, in order of position: [kept] int64."""
    n_cached = len(positions_S)
    by_position = np.argsort(positions_S, kind="stable")
    protected = np.zeros(n_cached, bool)
    protected[:sinks] = True
    protected[max(0, n_cached - recent) :] = True
    candidates = np.flatnonzero(~protected)
    best_first = np.argsort(-scores_S[by_position[candidates]], kind="stable")
    protected[candidates[best_first[: max(0, target - (n_cached - len(candidates)))]]] = True
    return by_position[protected]
