"""KVzap's calibration (arXiv 2601.07891): a linear function of each token's key and value that predicts how much a repetition
of the text attends to it, and thresholds of the predictions.

    target   log of the largest attention weight that the repetition gives the token, times the norm of its value after the
             output projection (KVzip+'s score, without the norm of the hidden state)
    fit      ridge regression for each KV head, features standardised
    row r    the threshold that 99 - r percent of all predictions exceed, over all layers and heads

Two passes over the prompts: statistics of features are summed in the first; predictions, which need the fit, are made in the
second. L layers with weights, K KV heads, N tokens, F features: 2 D + 2.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_kv.errors import UsageError
from trt_kv.head_shares import N_ROWS
from trt_kv.recipe import CREATED_BY, CalibrationRecord, Protected, Recipe, RecipeModel, RecipeSample, RecipeScore
from trt_kv.surrogate import Surrogate

Floats = npt.NDArray[np.floating[Any]]
RIDGE = 0.02
"""Added to the variance of each standardised feature."""
SMALLEST_TARGET = 1e-9
N_KEPT_DIGITS = 7


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Of a prompt: ``features`` [L, K, N, F], and ``use`` [L, K, N] >= 0, what the repetition attends to."""

    features: Floats
    use: Floats

    def __post_init__(self) -> None:
        if self.use.ndim != 3 or self.features.shape[:3] != self.use.shape or 0 in self.features.shape:
            raise UsageError("features and use do not fit together", got=(self.features.shape, self.use.shape))
        if not np.isfinite(self.features).all() or not np.isfinite(self.use).all() or (self.use < 0.0).any():
            raise UsageError("features or use hold invalid values", expected="finite numbers, use >= 0")


TokensOf = Callable[[Sequence[int], bool], Tokens]
"""Of a prompt's token ids; use is needed only if the second argument is true, and otherwise zeros."""


def calibrate_kvzap(
    prompts_token_ids: Sequence[Sequence[int]],
    tokens_of: TokensOf,
    *,
    budget: float,
    score: RecipeScore,
    model: RecipeModel,
    source: str,
    seed: int | None = None,
    protected: Protected | None = None,
    windowed_layers: Collection[int] = (),
    on_sample: Callable[[int, int], None] | None = None,
) -> Recipe:
    """The recipe whose surrogate predicts ``score``, for ``budget``: a share of the prompts' tokens in [0.01, 0.99].

    ``tokens_of`` leaves ``windowed_layers`` out. ``on_sample(done, total)`` is called after each prompt of each pass.
    ``UsageError`` for no prompts and for a budget out of range.
    """
    if not prompts_token_ids:
        raise UsageError("there are no prompts to calibrate with", expected="at least one prompt")
    if not 0.01 <= budget <= 0.99:
        raise UsageError("the budget is out of range", got=budget, expected="a number in [0.01, 0.99]", fix="e.g. --budget 0.1")
    n_prompts = len(prompts_token_ids)
    fit, uses = LinearFit(), []
    for index, token_ids in enumerate(prompts_token_ids):
        tokens = tokens_of(token_ids, True)
        fit.add(tokens.features, np.log(tokens.use + SMALLEST_TARGET))
        uses.append(tokens.use)
        if on_sample is not None:
            on_sample(index + 1, 2 * n_prompts)
    weights_LKF = fit.solved()
    predictions = []
    for index, token_ids in enumerate(prompts_token_ids):
        predictions.append(predicted(weights_LKF, tokens_of(token_ids, False).features))
        if on_sample is not None:
            on_sample(n_prompts + index + 1, 2 * n_prompts)
    surrogate = _surrogate(weights_LKF, predictions, windowed_layers)
    threshold = surrogate.threshold_at(budget)
    samples = [_sample(prediction > threshold, use, windowed_layers) for prediction, use in zip(predictions, uses, strict=True)]
    return Recipe(
        method="kvzap",
        score=score,
        budget=float(budget),
        kept=surrogate.kept_at(budget),
        mass=round(float(np.mean([sample.mass for sample in samples])), 9),
        protected=protected or Protected(),
        model=model,
        calibration=CalibrationRecord(source=source, seed=seed, samples=tuple(samples)),
        curves=None,
        surrogate=surrogate,
        created_by=CREATED_BY,
    )


class LinearFit:
    """Ridge regression of every KV head from sums over tokens, so that no prompt has to be kept."""

    def __init__(self) -> None:
        self._n = 0
        self._products: Floats = np.zeros(())
        self._sums: Floats = np.zeros(())

    def add(self, features: Floats, targets: Floats) -> None:
        """``features`` [L, K, N, F] and ``targets`` [L, K, N] of N more tokens."""
        products, sums = [], []
        for of_layer, wanted in zip(features, targets, strict=True):  # one after the other: in fp64 all of them are large
            rows = np.concatenate([of_layer, wanted[..., None]], axis=-1).astype(np.float64)
            products.append(np.matmul(rows.swapaxes(-1, -2), rows))
            sums.append(rows.sum(axis=-2))
        self._products = self._products + np.stack(products)
        self._sums = self._sums + np.stack(sums)
        self._n += features.shape[-2]

    def solved(self) -> Floats:
        """Weights [L, K, F + 1] fp64, the constant last. A feature that never varies has weight 0."""
        means = self._sums / self._n
        covariances = self._products / self._n - means[..., :, None] * means[..., None, :]
        varies = np.sqrt(np.maximum(np.diagonal(covariances, axis1=-2, axis2=-1), 0.0))[..., :-1]
        scales = np.where(varies > 1e-9, varies, np.inf)
        correlations = covariances[..., :-1, :-1] / scales[..., :, None] / scales[..., None, :]
        with_targets = covariances[..., :-1, -1] / scales
        ridge = RIDGE * np.eye(correlations.shape[-1])
        weights = np.linalg.solve(correlations + ridge, with_targets[..., None])[..., 0] / scales
        constants = means[..., -1] - (weights * means[..., :-1]).sum(axis=-1)
        return np.concatenate([weights, constants[..., None]], axis=-1)


def predicted(weights_LKF: Floats, features: Floats) -> Floats:
    """The scores [L, K, N] fp32 of tokens with ``features`` [L, K, N, F]."""
    linear, constants = weights_LKF[..., :-1, None].astype(np.float32), weights_LKF[..., -1:].astype(np.float32)
    scores: Floats = np.matmul(features.astype(np.float32), linear)[..., 0] + constants
    return scores


def _surrogate(weights_LKF: Floats, predictions: Sequence[Floats], windowed_layers: Collection[int]) -> Surrogate:
    everything = np.concatenate([scores.reshape(-1) for scores in predictions])
    removed = (np.arange(N_ROWS) + 1) / 100.0
    thresholds = np.quantile(everything.astype(np.float64), removed)
    rows = np.stack(
        [np.mean([(scores > at).mean(axis=(1, 2)) for scores in predictions], axis=0) for at in thresholds.astype(np.float32)]
    )
    n_layers = len(weights_LKF) + len(windowed_layers)
    measured = [layer for layer in range(n_layers) if layer not in windowed_layers]
    kept = np.ones((N_ROWS, n_layers))
    kept[:, measured] = rows
    weights = iter(weights_LKF.astype(np.float32))
    heads = [() if layer in windowed_layers else _numbers(next(weights)) for layer in range(n_layers)]
    return Surrogate(
        weights=tuple(heads),
        thresholds=tuple(round(float(threshold), 6) for threshold in thresholds),
        kept=tuple(tuple(row) for row in kept.round(6).tolist()),
    )


def _numbers(weights_KF: Floats) -> tuple[tuple[float, ...], ...]:
    """As decimals that are short and yet round to about the same fp32 numbers."""
    return tuple(tuple(float(f"{weight:.{N_KEPT_DIGITS}g}") for weight in weights_F) for weights_F in weights_KF)


def _sample(above_LKN: npt.NDArray[np.bool_], use_LKN: Floats, windowed_layers: Collection[int]) -> RecipeSample:
    shares = iter(np.maximum(above_LKN.mean(axis=(1, 2)), 1e-6).round(6).tolist())
    n_layers = len(above_LKN) + len(windowed_layers)
    total = float(use_LKN.astype(np.float64).sum())
    return RecipeSample(
        n_tokens=above_LKN.shape[2],
        kept=tuple(1.0 if layer in windowed_layers else next(shares) for layer in range(n_layers)),
        mass=min(1.0, round(float(use_LKN[above_LKN].astype(np.float64).sum()) / total, 9)) if total else 1.0,
    )
