"""PrefixKV's calibration (arXiv 2412.03409): all layers keep the same share of cumulative importance.

    C_l(j) = share of layer l's importance held by its j most important tokens
    R_l(p) = smallest j with C_l(j) >= p, plus the protected tokens
    find p with sum_l R_l(p) = budget * L * N

As in the released code, the curve runs over all N tokens, the sink and the last one included, and protected tokens are
counted on top of the prefix. Unlike it, the bisection is capped and the total is met exactly: if one step of p exceeds the
target, the remaining tokens are distributed one per layer and round, first layers first.

L layers, K KV heads, N tokens of a prompt.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from trt_kv.errors import UsageError
from trt_kv.recipe import CREATED_BY, CalibrationRecord, Curves, Protected, Recipe, RecipeModel, RecipeSample, RecipeScore

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
Importance = Callable[[Sequence[int]], npt.NDArray[np.floating[Any]]]
SinkCurve = Literal["in", "out"]

T = TypeVar("T")
MAX_BISECTIONS = 50
# Denser at small shares, where the curves are steep: the k-th of 41 points is (k / 40) squared.
CURVE_GRID: Floats = (np.arange(41) / 40.0) ** 2
_DEFAULT_PROTECTED = Protected()


@dataclass(frozen=True, kw_only=True)
class LayerBudgets:
    """Tokens kept per layer, int64 [L], and the common cumulative mass p that gives them, in [0, 1]."""

    kept: Ints
    mass: float


def calibrate_prefixkv(
    prompts_token_ids: Sequence[Sequence[int]],
    importance: Importance,
    *,
    budget: float,
    score: RecipeScore,
    model: RecipeModel,
    source: str,
    seed: int | None = None,
    protected: Protected = _DEFAULT_PROTECTED,
    sinks_in_curve: SinkCurve = "in",
    windowed_layers: Collection[int] = (),
    on_sample: Callable[[int, int], None] | None = None,
) -> Recipe:
    """The recipe for one budget; see ``calibrate_prefixkv_budgets``."""
    (recipe,) = calibrate_prefixkv_budgets(
        prompts_token_ids,
        importance,
        budgets=(budget,),
        score=score,
        model=model,
        source=source,
        seed=seed,
        protected=protected,
        sinks_in_curve=sinks_in_curve,
        windowed_layers=windowed_layers,
        on_sample=on_sample,
    )
    return recipe


def calibrate_prefixkv_budgets(
    prompts_token_ids: Sequence[Sequence[int]],
    importance: Importance,
    *,
    budgets: Sequence[float],
    score: RecipeScore,
    model: RecipeModel,
    source: str,
    seed: int | None = None,
    protected: Protected = _DEFAULT_PROTECTED,
    sinks_in_curve: SinkCurve = "in",
    windowed_layers: Collection[int] = (),
    on_sample: Callable[[int, int], None] | None = None,
) -> list[Recipe]:
    """One recipe per mean kept share in ``budgets``, from one pass over the prompts.

    ``importance`` scores a prompt's tokens per layer: token ids -> [L, K, N] floats >= 0, unnormalised, or [L, N] if all KV
    heads share a ranking. Kept shares, masses and curves are means over the prompts. ``source`` and ``seed`` describe the
    origin of the prompts. ``sinks_in_curve`` "out" leaves the protected first tokens out of the curves, so that their
    importance does not count. ``windowed_layers`` have an attention window and no budget: ``importance`` leaves them out, a
    budget is the mean over the others, and a recipe gives them 1. ``on_sample(done, total)`` is called after each prompt.
    ``UsageError`` for no prompts, a prompt
    not longer than the protected tokens, scores of another shape than [L, K, N], negative, not finite or all zero in a layer,
    and a budget outside (0, 1].
    """
    if not prompts_token_ids:
        raise UsageError("there are no prompts to calibrate with", expected="at least one prompt")
    n_measured = model.n_layers - len(windowed_layers)
    curves_XLG = np.zeros((len(prompts_token_ids), n_measured, len(CURVE_GRID)))
    samples: list[list[RecipeSample]] = [[] for _ in budgets]
    for index, token_ids in enumerate(prompts_token_ids):
        curves_LN = _curves_of_prompt(token_ids, importance, n_measured, protected, sinks_in_curve, f"prompt {index + 1}")
        curves_XLG[index] = _on_grid(curves_LN)
        for found, budget in zip(samples, budgets, strict=True):
            layers = search_budgets(curves_LN, len(token_ids), budget, protected=protected)
            kept = _with_windowed((layers.kept / len(token_ids)).round(6).tolist(), windowed_layers, 1.0)
            found.append(RecipeSample(n_tokens=len(token_ids), kept=kept, mass=round(layers.mass, 9)))
        if on_sample is not None:
            on_sample(index + 1, len(prompts_token_ids))
    curves_LG = np.maximum.accumulate(curves_XLG.mean(0), axis=1).round(4)
    curves = Curves(
        sinks=sinks_in_curve,
        kept_share=tuple(CURVE_GRID.round(6).tolist()),
        layers=_with_windowed([tuple(curve) for curve in curves_LG.tolist()], windowed_layers, ()),
    )
    return [
        Recipe(
            method="prefixkv",
            score=score,
            budget=float(budget),
            kept=tuple(np.mean([sample.kept for sample in found], axis=0).round(6).tolist()),
            mass=round(float(np.mean([sample.mass for sample in found])), 9),
            protected=protected,
            model=model,
            calibration=CalibrationRecord(source=source, seed=seed, samples=tuple(found)),
            curves=curves,
            created_by=CREATED_BY,
        )
        for budget, found in zip(budgets, samples, strict=True)
    ]


def _with_windowed(measured: Sequence[T], windowed_layers: Collection[int], value: T) -> tuple[T, ...]:
    """The values of all layers in order: of those with a window ``value``, of the others ``measured``."""
    left = iter(measured)
    n_layers = len(measured) + len(windowed_layers)
    return tuple(value if layer in windowed_layers else next(left) for layer in range(n_layers))


def online_budget(
    importance_LKN: npt.NDArray[np.floating[Any]],
    budget: float,
    *,
    protected: Protected = _DEFAULT_PROTECTED,
    sinks_in_curve: SinkCurve = "in",
) -> Ints:
    """Tokens to keep per layer, int64 [L], searched for this input (the paper's "online" variant).

    Errors as in ``calibrate_prefixkv_budgets``, except that a prompt may be short: then all of it is kept.
    """
    curves_LN = cumulative_curves(importance_LKN, sinks_out=protected.sinks if sinks_in_curve == "out" else 0)
    return search_budgets(curves_LN, importance_LKN.shape[-1], budget, protected=protected).kept


def cumulative_curves(importance_LKN: npt.NDArray[np.floating[Any]], *, sinks_out: int = 0) -> Floats:
    """C_l: cumulative shares of importance, most important token first, float64 [L, N - sinks_out], each row ending in 1.

    With a ranking for each KV head, C_l(j) is the share that the j most important tokens of every head hold together. The first
    ``sinks_out`` tokens are left out. ``UsageError`` for scores that are neither [L, K, N] nor [L, N], negative, not finite,
    or all zero in a layer.
    """
    if importance_LKN.ndim == 2:
        importance_LKN = importance_LKN[:, None]
    if importance_LKN.ndim != 3 or 0 in importance_LKN.shape[:2]:
        expected = "[layers, tokens] or [layers, KV heads, tokens]"
        raise UsageError("importance has the wrong shape", got=importance_LKN.shape, expected=expected)
    if not np.isfinite(importance_LKN).all() or (importance_LKN < 0.0).any():
        raise UsageError("importance holds invalid values", got="negative or not finite", expected="numbers >= 0")
    ranked_LN: Floats = np.sort(importance_LKN[:, :, sinks_out:].astype(np.float64), axis=2)[:, :, ::-1].sum(axis=1)
    if ranked_LN.shape[1] == 0:
        return ranked_LN
    empty = np.flatnonzero(ranked_LN[:, 0] == 0.0)
    if empty.size:
        raise UsageError("the importance of a layer is all zero", got=f"only zeros in layer {empty[0]}", expected="a sum > 0")
    sums_LN = np.cumsum(ranked_LN / ranked_LN[:, :1], axis=1)
    curves_LN: Floats = sums_LN / sums_LN[:, -1:]
    return curves_LN


def search_budgets(
    curves_LN: Floats, n_tokens: int, budget: float, *, protected: Protected = _DEFAULT_PROTECTED
) -> LayerBudgets:
    """The layers' budgets at the common mass at which they add up to round(budget * L * n_tokens).

    ``curves_LN``: from ``cumulative_curves``. Every layer keeps at least its protected tokens (and one token), at most
    ``n_tokens``; the total is met exactly unless these minima exceed it. No layer's budget decreases when ``budget`` increases.
    ``UsageError`` for a budget outside (0, 1].
    """
    if not 0.0 < budget <= 1.0:
        raise UsageError("the budget (share of tokens to keep) is out of range", got=budget, expected="a number in (0, 1]")
    target = round(budget * len(curves_LN) * n_tokens)

    def kept_at(mass: float) -> Ints:
        prefix_L = np.array([np.searchsorted(curve_N, mass, side="left") + 1 for curve_N in curves_LN], np.int64)
        return np.minimum(prefix_L + protected.n_tokens, n_tokens)

    low_L, high_L = kept_at(0.0), kept_at(1.0)
    if target < low_L.sum():
        floor_L = np.full_like(low_L, min(n_tokens, max(1, protected.n_tokens)))
        return LayerBudgets(kept=_handed_out(floor_L, low_L, target), mass=0.0)
    if target > high_L.sum():
        return LayerBudgets(kept=_handed_out(high_L, np.full_like(high_L, n_tokens), target), mass=1.0)
    low, high = 0.0, 1.0
    for _ in range(MAX_BISECTIONS):
        middle = (low + high) / 2.0
        middle_L = kept_at(middle)
        if middle_L.sum() == target:
            return LayerBudgets(kept=middle_L, mass=middle)
        if middle_L.sum() < target:
            low, low_L = middle, middle_L
        else:
            high, high_L = middle, middle_L
    return LayerBudgets(kept=_handed_out(low_L, high_L, target), mass=high)


def _handed_out(low_L: Ints, high_L: Ints, target: int) -> Ints:
    """``low_L`` plus one token per layer and round, first layers first, none above ``high_L``, until the sum is ``target``."""
    kept_L = low_L.copy()
    while (missing := target - int(kept_L.sum())) > 0:
        room_L = high_L - kept_L
        open_L = np.flatnonzero(room_L)
        rounds = min(int(room_L[open_L].min()), missing // len(open_L))
        if rounds == 0:
            kept_L[open_L[:missing]] += 1
        else:
            kept_L[open_L] += rounds
    return kept_L


def check_length(token_ids: Sequence[int], protected: Protected, name: str) -> None:
    """``UsageError`` for a calibration prompt of which all tokens are protected."""
    if len(token_ids) <= protected.n_tokens:
        raise UsageError(
            f"calibration {name} is too short",
            got=f"{len(token_ids)} tokens",
            expected=f"more than the {protected.n_tokens} protected tokens",
            fix="calibrate with prompts as long as those in production",
        )


def _curves_of_prompt(
    token_ids: Sequence[int],
    importance: Importance,
    n_layers: int,
    protected: Protected,
    sinks_in_curve: SinkCurve,
    name: str,
) -> Floats:
    """The cumulative curves of one calibration prompt, after checks of its length and of the scorer's result."""
    check_length(token_ids, protected, name)
    scores_LKN = importance(token_ids)
    if scores_LKN.ndim not in (2, 3) or (scores_LKN.shape[0], scores_LKN.shape[-1]) != (n_layers, len(token_ids)):
        raise UsageError(
            f"the importance of calibration {name} has the wrong shape",
            got=scores_LKN.shape,
            expected=f"[{n_layers} layers, KV heads, {len(token_ids)} tokens], or without KV heads",
        )
    return cumulative_curves(scores_LKN, sinks_out=protected.sinks if sinks_in_curve == "out" else 0)


def _on_grid(curves_LN: Floats) -> Floats:
    """The curves at the kept shares of ``CURVE_GRID``, float64 [L, 41], linear between tokens, 0 at share 0."""
    n_tokens = curves_LN.shape[1]
    shares = np.arange(n_tokens + 1) / n_tokens
    return np.stack([np.interp(CURVE_GRID, shares, np.concatenate(([0.0], curve_N))) for curve_N in curves_LN])
