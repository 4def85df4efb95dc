"""AdaptiveBudget in plain fp64 loops."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.adaptive_budget.arguments import Arguments
from trt_kv.plugins.adaptive_budget.spec import NO_WEIGHT
from trt_kv.plugins.paging import Floats, Ints, capped, gather_kv, gather_slots, pages_of


def run(args: Arguments[NDArray[Any]]) -> tuple[Ints]:
    """Spec: ``spec.py``. Returns (budget [B],)."""
    assert args.scores is not None or (args.ranking == 1 and args.row == 0)
    budget = args.kv_len[args.layer].copy()
    for b in np.flatnonzero(args.evict == 1):
        n_cached = int(args.kv_len[args.layer, b])
        last = int(args.cu_tokens[b + 1]) - 1
        if n_cached <= args.sinks + args.recent or (args.row == 0 and last < args.cu_tokens[b]):
            continue
        pages = pages_of(args.page_table, args.layer, b, n_cached, args.page_size)
        k_KSD, _ = gather_kv(args.kv, pages, n_cached)
        positions_KS = gather_slots(args.token_positions, pages, n_cached)
        scores_KS = np.full(positions_KS.shape, np.nan) if args.scores is None else gather_slots(args.scores, pages, n_cached)
        heads = args.q.shape[1] if args.row == 0 else len(scores_KS)
        kv_heads = [h * len(scores_KS) // heads for h in range(heads)]
        if args.row == 0:
            rows = [
                attention_row(args.q[last, h], k_KSD[kv_heads[h]], float(args.lse[last, h]), args.scale, args.soft_cap)
                for h in range(heads)
            ]
        else:
            rows = [[abs(float(score)) for score in scores_S] for scores_S in scores_KS]
        rows = [[weight if weight >= NO_WEIGHT else 0.0 for weight in weights] for weights in rows]

        norms = []
        for h in range(heads):
            protected, candidates = ranked_slots(
                positions_KS[kv_heads[h]], scores_KS[kv_heads[h]], args.sinks, args.recent, args.ranking
            )
            square = sum(rows[h][slot] ** 2 for slot in protected) if args.protected_in_norm else 0.0
            norms.append([math.sqrt(square)])
            for slot in candidates:
                square += rows[h][slot] ** 2
                norms[h].append(math.sqrt(square))
        mean_norms = [sum(norms[h][c] for h in range(heads)) / heads for c in range(len(norms[0]))]
        needed = (1.0 - float(np.float32(args.threshold))) * mean_norms[-1]
        budget[b] = args.sinks + args.recent + next(c for c, norm in enumerate(mean_norms) if norm >= needed)
    return (budget,)


def attention_row(q_D: Floats, k_SD: Floats, lse: float, scale: float, soft_cap: float = 0.0) -> list[float]:
    """The query's attention weight for each of S tokens: exp(logit - lse)."""
    logits_S = capped(scale * (k_SD.astype(np.float64) @ q_D.astype(np.float64)), soft_cap)
    return [math.exp(float(logit) - lse) for logit in logits_S]


def ranked_slots(positions_S: Ints, scores_S: Floats, sinks: int, recent: int, ranking: int) -> tuple[list[int], list[int]]:
    """One KV head's protected slots, and its candidates in the order in which they are kept."""
    by_position = sorted(range(len(positions_S)), key=lambda slot: positions_S[slot])
    end = len(by_position) - recent
    candidates = by_position[sinks:end]
    if ranking == 0:
        candidates.sort(key=lambda slot: -scores_S[slot])
    else:
        candidates.reverse()
    return by_position[:sinks] + by_position[end:], candidates
