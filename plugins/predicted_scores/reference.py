"""PredictedScores in plain fp64 loops."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.paging import Floats, Ints, gather_kv, gather_slots, pages_of, scatter_slots
from trt_kv.plugins.predicted_scores.arguments import Arguments
from trt_kv.plugins.predicted_scores.spec import SMALLEST_NORM


def run(args: Arguments[NDArray[Any]]) -> tuple[Ints]:
    """Spec: ``spec.py``. Returns (budget [B],); updates scores in place."""
    budget = args.kv_len[args.layer].copy()
    n_heads = args.kv.shape[2]
    weights_KF = np.array(args.weights, np.float32).reshape(n_heads, -1).astype(np.float64)
    for b in np.flatnonzero(args.evict == 1):
        n_cached = int(args.kv_len[args.layer, b])
        pages = pages_of(args.page_table, args.layer, b, n_cached, args.page_size)
        k_KSD, v_KSD = gather_kv(args.kv, pages, n_cached)
        positions_KS = gather_slots(args.token_positions, pages, n_cached)
        scores_KS = np.zeros(positions_KS.shape)
        needed = []
        for head in range(n_heads):
            for slot in range(n_cached):
                k_D = turned_back(k_KSD[head, slot], int(positions_KS[head, slot]), args.frequencies)
                features = np.array([*k_D, *v_KSD[head, slot], log_norm(k_KSD[head, slot]), log_norm(v_KSD[head, slot]), 1.0])
                scores_KS[head, slot] = weights_KF[head] @ features
            by_position = np.argsort(positions_KS[head])
            others = by_position[args.sinks : n_cached - args.recent]
            above = sum(float(np.float32(scores_KS[head, slot])) > float(np.float32(args.threshold)) for slot in others)
            needed.append(args.sinks + args.recent + above)
        scatter_slots(args.scores, pages, scores_KS.astype(np.float32))
        budget[b] = min(n_cached, max(needed))
    return (budget,)


def turned_back(k_D: Floats, position: int, frequencies: Sequence[float]) -> list[float]:
    """The key before its rotation, but for a factor of the rotation."""
    turned = [float(x) for x in k_D]
    n_pairs = len(frequencies)
    for pair, frequency in enumerate(frequencies):
        angle = float(np.float32(position) * np.float32(frequency))
        low, high = float(k_D[pair]), float(k_D[pair + n_pairs])
        turned[pair] = low * math.cos(angle) + high * math.sin(angle)
        turned[pair + n_pairs] = high * math.cos(angle) - low * math.sin(angle)
    return turned


def log_norm(x_D: Floats) -> float:
    """The logarithm of a vector's norm."""
    return math.log(max(SMALLEST_NORM, math.sqrt(sum(float(x) ** 2 for x in x_D))))
