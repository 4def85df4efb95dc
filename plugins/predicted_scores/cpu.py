"""PredictedScores on the CPU: every token's row is read once, in its page."""

import math
from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.jit import njit
from trt_kv.plugins.kv_rows import head_size_of, number, scale_of
from trt_kv.plugins.paging import Floats, Ints, Rows, pages_of
from trt_kv.plugins.predicted_scores.arguments import Arguments
from trt_kv.plugins.predicted_scores.spec import SMALLEST_NORM

LEAST_SQUARE = np.float32(SMALLEST_NORM**2)


def run(args: Arguments[NDArray[Any]]) -> tuple[Ints]:
    """Spec: ``spec.py``. Returns (budget [B],); updates scores in place."""
    budget = args.kv_len[args.layer].copy()
    weights_KF = np.array(args.weights, np.float32).reshape(args.kv.shape[2], 2 * head_size_of(args.kv) + 3)
    frequencies = np.array(args.frequencies, np.float32)
    for b in np.flatnonzero(args.evict == 1):
        n_cached = int(args.kv_len[args.layer, b])
        pages = pages_of(args.page_table, args.layer, b, n_cached, args.page_size)
        score_tokens(args.kv, args.token_positions, args.scores, pages, n_cached, weights_KF, frequencies)
        if n_cached > args.sinks + args.recent:
            budget[b] = needed(
                args.scores, args.token_positions, pages, n_cached, np.float32(args.threshold), args.sinks, args.recent
            )
    return (budget,)


@njit(parallel=True, fastmath={"contract", "reassoc", "nsz", "arcp"})
def score_tokens(
    kv: Rows, token_positions: Ints, scores: Floats, pages_T: Ints, n_cached: int, weights_KF: Floats, frequencies_F: Floats
) -> None:
    """Writes the scores of a sequence's tokens.

    Weights are turned forward instead of keys back: w . R(-a) k = (R(a) w) . k.
    """
    n_heads, page_size = kv.shape[2:4]
    n_pairs = len(frequencies_F)
    head_size = (weights_KF.shape[1] - 3) // 2
    for t in numba.prange(len(pages_T)):
        page = pages_T[t]
        turned_D = np.empty(head_size, np.float32)
        for head in range(n_heads):
            w_F = weights_KF[head]
            for s in range(min(page_size, n_cached - t * page_size)):
                position = np.float32(token_positions[page, head, s])
                for d in range(2 * n_pairs, head_size):
                    turned_D[d] = w_F[d]
                for pair in range(n_pairs):
                    angle = position * frequencies_F[pair]
                    cos, sin = np.float32(math.cos(angle)), np.float32(math.sin(angle))
                    low, high = w_F[pair], w_F[pair + n_pairs]
                    turned_D[pair] = low * cos - high * sin
                    turned_D[pair + n_pairs] = high * cos + low * sin
                of_key, of_value = np.float32(0.0), np.float32(0.0)
                key_square, value_square = np.float32(0.0), np.float32(0.0)
                for d in range(head_size):
                    key, value = number(kv[page, 0, head, s, d]), number(kv[page, 1, head, s, d])
                    of_key += turned_D[d] * key
                    of_value += w_F[head_size + d] * value
                    key_square += key * key
                    value_square += value * value
                key_scale, value_scale = scale_of(kv[page, 0, head, s]), scale_of(kv[page, 1, head, s])
                key_norm = np.float32(0.5) * np.log(max(LEAST_SQUARE, key_square * key_scale * key_scale))
                value_norm = np.float32(0.5) * np.log(max(LEAST_SQUARE, value_square * value_scale * value_scale))
                total = of_key * key_scale + of_value * value_scale
                total += w_F[2 * head_size] * key_norm + w_F[2 * head_size + 1] * value_norm
                scores[page, head, s] = total + w_F[2 * head_size + 2]


@njit()
def needed(
    scores: Floats, token_positions: Ints, pages_T: Ints, n_cached: int, threshold: np.float32, sinks: int, recent: int
) -> int:
    """The largest number of tokens that a KV head needs: protected ones, and others whose score exceeds the threshold."""
    n_heads, page_size = scores.shape[1:]
    most = 0
    for head in range(n_heads):
        positions_S = np.empty(n_cached, np.int64)
        for s in range(n_cached):
            positions_S[s] = token_positions[pages_T[s // page_size], head, s % page_size]
        in_order_S = np.sort(positions_S)
        first, end = in_order_S[sinks], in_order_S[n_cached - 1 - recent]
        count = sinks + recent
        for s in range(n_cached):
            if first <= positions_S[s] <= end and scores[pages_T[s // page_size], head, s % page_size] > threshold:
                count += 1
        most = max(most, count)
    return most
