"""EvictTokens in plain loops."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.evict_tokens.arguments import Arguments
from trt_kv.plugins.lots import key_of, lot_of
from trt_kv.plugins.paging import Floats, Ints

Slot = tuple[int, int, int]
"""Page, KV head, offset."""


def run(args: Arguments[NDArray[Any]]) -> tuple[Ints]:
    """Spec: ``spec.py``. Returns (kept [B],); updates kv, token_positions and scores in place."""
    kept = args.kv_len[args.layer].copy()
    for b in np.flatnonzero(args.evict):
        n = int(args.kv_len[args.layer, b])
        target = args.kept_tokens + n - round((1.0 - float(np.float32(args.kept_share))) * n)
        if args.budget is not None:
            target = int(args.budget[b])
        drops = args.evict[b] == 2
        if drops:
            target = n - args.drop
        target = min(n, max(1, args.floor, target))
        recents = max(args.recent, int(float(np.float32(args.recent_share)) * max(0, target - args.sinks)))
        kept[b] = min(n, max(target, args.sinks + recents))
        for head in range(args.kv.shape[2]):
            slots = [(int(args.page_table[args.layer, b, s // args.page_size]), head, s % args.page_size) for s in range(n)]
            by_position = sorted(slots, key=lambda slot: args.token_positions[slot])
            worth = _worth(args.ranking, args.seed, args.layer, head, by_position, args.token_positions, args.scores)
            protected = set(by_position[: args.sinks]) | set(by_position[max(0, n - recents) :])
            others = sorted((slot for slot in by_position if slot not in protected), key=lambda slot: -worth[slot])
            chosen = protected | set(others[: kept[b] - len(protected)])
            if drops:
                behind = [slot for slot in slots[kept[b] :] if slot in chosen]
                sources = [slot if slot in chosen else behind.pop(0) for slot in slots[: kept[b]]]
            else:
                sources = [slot for slot in by_position if slot in chosen]
            rows = [(args.kv[m, :, k, p].copy(), args.token_positions[m, k, p], args.scores[m, k, p]) for m, k, p in sources]
            for (m, k, p), (kv_2D, position, score) in zip(slots, rows, strict=False):
                args.kv[m, :, k, p] = kv_2D
                args.token_positions[m, k, p] = position
                args.scores[m, k, p] = score
    return (kept,)


def _worth(
    ranking: int, seed: int, layer: int, head: int, by_position: list[Slot], token_positions: Ints, scores: Floats
) -> dict[Slot, float]:
    """The values that the tokens of one KV head are ranked by."""
    match ranking:
        case 0:
            return {slot: float(scores[slot]) for slot in by_position}
        case 1:
            return {slot: rank for rank, slot in enumerate(by_position)}
        case _:
            key = key_of(seed, layer, head)
            return {slot: lot_of(key, int(token_positions[slot])) for slot in by_position}
