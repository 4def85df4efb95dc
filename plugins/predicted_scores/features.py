"""What PredictedScores multiplies with its weights, for many tokens at once: calibration fits the weights to it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trt_kv.plugins.paging import Floats, Ints
from trt_kv.plugins.predicted_scores.spec import SMALLEST_NORM


def features_of(k_KND: Floats, v_KND: Floats, positions_N: Ints, frequencies: Sequence[float]) -> NDArray[np.float32]:
    """[K, N, 2 D + 2] fp32 of keys and values [K, N, D] fp32: all features but the constant 1, in the order of the weights."""
    frequencies_F = np.array(frequencies, np.float32)
    angles_NF = positions_N.astype(np.float32)[:, None] * frequencies_F
    cos, sin = np.cos(angles_NF), np.sin(angles_NF)
    n_pairs = len(frequencies_F)
    low, high, still = np.split(k_KND, [n_pairs, 2 * n_pairs], axis=2)
    norms = [_log_norms(k_KND), _log_norms(v_KND)]
    parts: list[NDArray[Any]] = [low * cos + high * sin, high * cos - low * sin, still, v_KND, *norms]
    return np.concatenate(parts, axis=2).astype(np.float32)


def _log_norms(x_KND: Floats) -> Floats:
    norms: Floats = np.linalg.norm(x_KND.astype(np.float64), axis=2, keepdims=True)
    return np.log(np.maximum(norms, SMALLEST_NORM))
