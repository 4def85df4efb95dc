"""Statistics of queries before their rotation, which TriAttention ranks keys by (arXiv 2604.04921).

A rotation turns pairs of channels, so each pair is a complex number: channel d with channel d + D/2. Of each query head and
pair: the mean of the numbers and the mean of their absolute values, over all tokens of all prompts.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trt_kv.errors import UsageError

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class QueryStatistics:
    """E q (``mean_real`` and ``mean_imaginary``) and E|q| (``mean_absolute``) per layer, query head and pair of channels:
    [L, H, D/2], over ``n_tokens`` tokens.
    """

    mean_real: Floats
    mean_imaginary: Floats
    mean_absolute: Floats
    n_tokens: int

    @property
    def arrays(self) -> Mapping[str, NDArray[np.float32]]:
        """By the names that TriAttention's own calibration gives them, fp32."""
        named = {"q_mean_real": self.mean_real, "q_mean_imag": self.mean_imaginary, "q_abs_mean": self.mean_absolute}
        return {name: np.ascontiguousarray(values, np.float32) for name, values in named.items()}


class QueryRecorder:
    """Sums over queries."""

    def __init__(self, n_layers: int, n_heads: int, head_dim: int) -> None:
        shape = n_layers, n_heads, head_dim // 2
        self._sums = [np.zeros(shape) for _ in range(3)]
        self._n_tokens = np.zeros(n_layers, np.int64)

    def add(self, layer: int, q_NHD: NDArray[np.float32]) -> None:
        """Count the queries of N tokens, normed but not rotated."""
        low, high = np.split(q_NHD.astype(np.float64), 2, axis=-1)
        for total, values in zip(self._sums, (low, high, np.hypot(low, high)), strict=True):
            total[layer] += values.sum(axis=0)
        self._n_tokens[layer] += len(q_NHD)

    def statistics(self) -> QueryStatistics:
        """The means. ``UsageError`` if no token was counted."""
        n_tokens = int(self._n_tokens[0])
        if n_tokens == 0:
            raise UsageError("there are no queries to average", got="no tokens", expected="prompts with tokens")
        assert (self._n_tokens == n_tokens).all()
        real, imaginary, absolute = (total / n_tokens for total in self._sums)
        return QueryStatistics(mean_real=real, mean_imaginary=imaginary, mean_absolute=absolute, n_tokens=n_tokens)
