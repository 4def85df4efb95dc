"""A linear surrogate of how much later text attends to a token, from its key and value: what a recipe of method "kvzap" holds.

The op PredictedScores computes it. L layers, K KV heads, D head size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trt_kv.cache_layers import each_repeated
from trt_kv.errors import EngineError, RecipeError
from trt_kv.head_shares import N_ROWS
from trt_kv.model_config import ModelConfig

Weights = tuple[tuple[tuple[float, ...], ...], ...]
"""By layer, then by KV head; those of a head in the order of PredictedScores. A layer with an attention window has no heads."""


def n_weights(head_dim: int) -> int:
    """Numbers of a KV head: for the key, the value, the logarithms of their norms, and a constant."""
    return 2 * head_dim + 3


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Attributes of PredictedScores in one layer of the cache: ``weights`` of its KV heads one after the other, ``frequencies``
    of the rotation of its keys, and the ``threshold``.
    """

    weights: tuple[float, ...] = ()
    frequencies: tuple[float, ...] = ()
    threshold: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Surrogate:
    """``RecipeError`` for tables of other sizes and numbers that are not finite.

    ``thresholds[r]`` is exceeded by 99 - r percent of the scores of the calibration prompts' tokens, over all KV heads that
    have weights; ``kept[r][l]``: by which share of those of layer l. A layer without weights has 1 in every row.
    """

    weights: Weights
    thresholds: tuple[float, ...]
    kept: tuple[tuple[float, ...], ...]

    def __post_init__(self) -> None:
        if (len(self.thresholds), len(self.kept)) != (N_ROWS, N_ROWS):
            got = f"{len(self.thresholds)} thresholds, {len(self.kept)} rows of shares"
            raise RecipeError("the surrogate's thresholds are not of all budgets", got=got, expected=f"{N_ROWS} of each")
        if {len(row) for row in self.kept} != {len(self.weights)}:
            raise RecipeError("the surrogate has not one kept share per layer", expected=f"{len(self.weights)} in every row")
        sizes = {(len(heads), *{len(weights) for weights in heads}) for heads in self.weights if heads}
        if len(sizes) != 1 or len(next(iter(sizes))) != 2:
            raise RecipeError("the surrogate's weights are not a table", expected="as many heads and numbers in every layer")
        numbers = [weight for heads in self.weights for weights in heads for weight in weights]
        if not all(map(math.isfinite, [*numbers, *self.thresholds])) or list(self.thresholds) != sorted(self.thresholds):
            raise RecipeError("the surrogate's numbers are not finite, or its thresholds do not ascend")
        if not all(0.0 <= share <= 1.0 for row in self.kept for share in row):
            raise RecipeError("the surrogate's kept shares are no shares", expected="numbers in [0, 1]")

    @property
    def n_layers(self) -> int:
        return len(self.weights)

    @property
    def shape(self) -> tuple[int, int]:
        """KV heads of a layer, and weights of a head."""
        heads = next(heads for heads in self.weights if heads)
        return len(heads), len(heads[0])

    def threshold_at(self, kept: float) -> float:
        """What the share ``kept`` of the calibration tokens' scores exceeds; ``RecipeError`` outside of 1 to 99 percent."""
        row, weight = _row_of(kept)
        low, high = self.thresholds[row], self.thresholds[min(row + 1, N_ROWS - 1)]
        return low + weight * (high - low)

    def kept_at(self, kept: float) -> tuple[float, ...]:
        """Which share of each layer's tokens that is; at least a millionth, since a layer keeps its protected tokens."""
        row, weight = _row_of(kept)
        pairs = zip(self.kept[row], self.kept[min(row + 1, N_ROWS - 1)], strict=True)
        return tuple(max(1e-6, round(low + weight * (high - low), 6)) for low, high in pairs)

    def predictors(
        self, config: ModelConfig, kept: float, frequencies: Sequence[tuple[float, ...]], *, heads_apart: int
    ) -> list[Predictor]:
        """One for each layer of the cache (``trt_kv/cache_layers.py``), for the model of ``config``, whose layers turn their
        keys by ``frequencies``.

        ``RecipeError`` if that has other layers or heads.
        """
        expected = (config.n_layers, config.n_kv_heads, n_weights(config.head_dim))
        if (self.n_layers, *self.shape) != expected:
            raise RecipeError(
                "the recipe's surrogate is of another model",
                got=f"(layers, KV heads, weights) {(self.n_layers, *self.shape)}",
                expected=expected,
            )
        threshold, found = self.threshold_at(kept), []
        for heads, frequencies_F in zip(self.weights, frequencies, strict=True):
            parts = [(weights,) for weights in heads] if heads_apart > 1 else [heads]
            found += [
                Predictor(weights=tuple(w for head in part for w in head), frequencies=frequencies_F, threshold=threshold)
                for part in parts or each_repeated([()], heads_apart)
            ]
        return found


def neutral_predictor(cache: ModelConfig) -> Predictor:
    """Predicts 0 in a layer of ``cache_config``, from weights as large as others."""
    return Predictor(
        weights=(0.0,) * (cache.n_kv_heads * n_weights(cache.head_dim)), frequencies=(0.0,) * (cache.head_dim // 2)
    )


def check_predictors(predictors: Sequence[Predictor | None], config: ModelConfig, *, heads_apart: int) -> None:
    """``EngineError`` unless kernels can run them on a cache of the model: they do not check what they read."""
    if not any(predictors):
        return
    size = config.n_kv_heads // heads_apart * n_weights(config.head_dim)
    for layer, found in enumerate(predictors):
        if found is None:
            continue
        numbers = [*found.weights, *found.frequencies, found.threshold]
        fits = len(found.weights) == size and 2 * len(found.frequencies) <= config.head_dim
        if not fits or not all(map(math.isfinite, numbers)):
            raise EngineError(
                f"the predicted scores of layer {layer} of the cache do not fit the model",
                got=f"{len(found.weights)} weights, {len(found.frequencies)} frequencies",
                expected=f"{size}, and at most {config.head_dim // 2}, all finite",
            )


def _row_of(kept: float) -> tuple[int, float]:
    """The row below a kept share, and how far it is to the next one."""
    removed = round(100.0 * (1.0 - kept), 9)
    if not 1.0 <= removed <= N_ROWS:
        raise RecipeError("the budget is out of range", got=kept, expected="a number in [0.01, 0.99]")
    return int(removed) - 1, removed % 1.0
