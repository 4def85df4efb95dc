"""TokenScores in plain fp32 loops."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.paging import Floats, Ints, capped, gather_kv, gather_slots, pages_of, scatter_slots
from trt_kv.plugins.token_scores.arguments import Arguments


def run(args: Arguments[NDArray[Any]]) -> tuple[()]:
    """Spec: ``spec.py``. Updates scores in place."""
    n_heads = args.q.shape[1]
    n_kv_heads = args.kv.shape[2]
    for slot in args.slots[args.layer]:
        page, offset = divmod(int(slot), args.page_size)
        args.scores[page, :, offset] = 0.0
    for b in range(len(args.cu_tokens) - 1):
        n_cached = int(args.kv_len[args.layer, b])
        pages = pages_of(args.page_table, args.layer, b, n_cached, args.page_size)
        k_KSD, v_KSD = gather_kv(args.kv, pages, n_cached)
        positions_KS = gather_slots(args.token_positions, pages, n_cached)
        scores_KS = gather_slots(args.scores, pages, n_cached)
        rows = range(args.cu_tokens[b], args.cu_tokens[b + 1])
        for i in rows:
            if not _counts(int(args.prompt_remaining[i]), args.window, args.generated):
                continue
            for h in range(n_heads):
                kv_head = h * n_kv_heads // n_heads
                visible = positions_KS[kv_head] <= args.positions[i]
                logits = (k_KSD[kv_head, visible] * args.q[i, h]).sum(axis=1) * np.float32(args.scale)
                logits = capped(logits, args.soft_cap)
                weights = np.exp(logits - args.lse[i, h])
                heads = slice(kv_head, kv_head + 1) if args.per_head else slice(None)
                if args.maximum:
                    scores_KS[heads, visible] = np.maximum(scores_KS[heads, visible], weights)
                elif args.per_head:
                    scores_KS[kv_head, visible] += weights / (n_heads // n_kv_heads)
                else:
                    scores_KS[:, visible] += weights / n_heads
        last = max((int(args.positions[i]) for i in rows if args.prompt_remaining[i] == 0), default=None)
        if last is not None:
            for positions_S, scores_S in zip(positions_KS, scores_KS, strict=True):
                if args.average:
                    _average(positions_S, scores_S, last, args.window)
                _pool(positions_S, scores_S, last - args.window, args.pooling)
                if args.value_norm:
                    _raise_to_mean(positions_S, scores_S, last - args.window)
            if args.value_norm:
                squares_KS = (v_KSD**2).sum(axis=2)
                scores_KS *= np.sqrt(squares_KS if args.per_head else squares_KS.sum(axis=0))
        scatter_slots(args.scores, pages, scores_KS)
    return ()


def _counts(remaining: int, window: int, generated: int) -> bool:
    if remaining < 0:
        return remaining == -1 and generated == 1
    return window == 0 or remaining < window


def _average(positions_S: Ints, scores_S: Floats, last: int, window: int) -> None:
    """Divide each score by the number of counted queries at the token's position or behind it."""
    for slot, position in enumerate(positions_S):
        n_queries = last - int(position) + 1
        scores_S[slot] /= max(1, min(n_queries, window) if window else n_queries)


def _raise_to_mean(positions_S: Ints, scores_S: Floats, end: int) -> None:
    """Raise the scores of tokens at positions up to ``end`` to at least their mean."""
    is_before = positions_S <= end
    if is_before.any():
        scores_S[is_before] = np.maximum(scores_S[is_before], scores_S[is_before].mean())


def _pool(positions_S: Ints, scores_S: Floats, end: int, pooling: int) -> None:
    """Replace the scores of tokens at positions up to ``end`` by the mean of ``pooling`` neighbours among them."""
    pooled = sorted((slot for slot in range(len(positions_S)) if positions_S[slot] <= end), key=lambda slot: positions_S[slot])
    before = scores_S[pooled]
    reach = pooling // 2
    for i, slot in enumerate(pooled):
        scores_S[slot] = before[max(0, i - reach) : i + reach + 1].sum() / np.float32(pooling)
