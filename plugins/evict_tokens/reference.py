"""EvictTokens in plain loops."""

import numpy as np

from trt_kv.plugins.paging import Floats, Ints


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
        slots = [(int(page_table[layer, b, s // page_size]), s % page_size) for s in range(n_cached)]
        by_position = sorted(slots, key=lambda slot: token_positions[slot])
        protected = set(by_position[:sinks]) | set(by_position[max(0, n_cached - recent) :])
        forgotten = (1.0 - float(np.float32(kept_share))) * n_cached
        target = n_cached - round(forgotten) if budget is None else int(budget[b])
        others = [slot for slot in by_position if slot not in protected]
        others.sort(key=lambda slot: -scores[slot])
        chosen = protected | set(others[: max(0, target - len(protected))])
        survivors = [slot for slot in by_position if slot in chosen]
        rows = [
            (kv[page, :, :, offset].copy(), token_positions[page, offset], scores[page, offset]) for page, offset in survivors
        ]
        for (page, offset), (kv_2KD, position, score) in zip(slots, rows, strict=False):
            kv[page, :, :, offset] = kv_2KD
            token_positions[page, offset] = position
            scores[page, offset] = score
        kept[b] = len(survivors)
    return (kept,)
