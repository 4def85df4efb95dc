"""EvictTokens in plain loops."""

import numpy as np

from trt_kv.plugins.lots import key_of, lot_of
from trt_kv.plugins.paging import Floats, Ints

Slot = tuple[int, int, int]
"""Page, KV head, offset."""


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
    kept_tokens: int = 0,
    drop: int = 1,
    sinks: int = 1,
    recent: int = 1,
    recent_share: float = 0.0,
    ranking: int = 0,
    seed: int = 0,
    budget: Ints | None = None,
) -> tuple[Ints]:
    """Spec: ``spec.py``. Returns (kept [B],); updates kv, token_positions and scores in place."""
    kept = kv_len[layer].copy()
    for b in np.flatnonzero(evict):
        n = int(kv_len[layer, b])
        target = kept_tokens + n - round((1.0 - float(np.float32(kept_share))) * n)
        if budget is not None:
            target = int(budget[b])
        drops = evict[b] == 2
        if drops:
            target = n - drop
        target = min(n, max(0, target))
        recents = max(recent, int(float(np.float32(recent_share)) * max(0, target - sinks)))
        kept[b] = min(n, max(target, sinks + recents))
        for head in range(kv.shape[2]):
            slots = [(int(page_table[layer, b, s // page_size]), head, s % page_size) for s in range(n)]
            by_position = sorted(slots, key=lambda slot: token_positions[slot])
            worth = _worth(ranking, seed, layer, head, by_position, token_positions, scores)
            protected = set(by_position[:sinks]) | set(by_position[max(0, n - recents) :])
            others = sorted((slot for slot in by_position if slot not in protected), key=lambda slot: -worth[slot])
            chosen = protected | set(others[: kept[b] - len(protected)])
            if drops:
                behind = [slot for slot in slots[kept[b] :] if slot in chosen]
                sources = [slot if slot in chosen else behind.pop(0) for slot in slots[: kept[b]]]
            else:
                sources = [slot for slot in by_position if slot in chosen]
            rows = [(kv[m, :, k, p].copy(), token_positions[m, k, p], scores[m, k, p]) for m, k, p in sources]
            for (m, k, p), (kv_2D, position, score) in zip(slots, rows, strict=False):
                kv[m, :, k, p] = kv_2D
                token_positions[m, k, p] = position
                scores[m, k, p] = score
    return (kept,)


def _worth(
    ranking: int, seed: int, layer: int, head: int, by_position: list[Slot], token_positions: Ints, scores: Floats
) -> dict[Slot, float]:
    """What the tokens of one KV head are ranked by."""
    match ranking:
        case 0:
            return {slot: float(scores[slot]) for slot in by_position}
        case 1:
            return {slot: rank for rank, slot in enumerate(by_position)}
        case _:
            key = key_of(seed, layer, head)
            return {slot: lot_of(key, int(token_positions[slot])) for slot in by_position}
