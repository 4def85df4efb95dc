"""What PrefixKV's calibration promises: the budget is met, the layers are cut at one common mass, and nothing else decides."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from trt_kv.calibration.prefixkv import (
    MAX_BISECTIONS,
    SinkCurve,
    calibrate_prefixkv,
    calibrate_prefixkv_budgets,
    cumulative_curves,
    online_budget,
    search_budgets,
)
from trt_kv.errors import UsageError
from trt_kv.recipe import Protected, Recipe, RecipeModel, RecipeScore

Floats = npt.NDArray[np.float64]
MODEL = RecipeModel(name="tiny", digest="sha256:01", n_layers=3)
MASS = RecipeScore(name="mass")


def _with_mass_in_every_layer(importance_LN: Floats) -> Floats:
    """Layers without any importance get some on their last token, which no option leaves out."""
    importance_LN[(importance_LN[:, 2:] == 0).all(1), -1] = 1.0
    return importance_LN


shapes = array_shapes(min_dims=2, max_dims=2, min_side=3, max_side=40).map(lambda shape: (min(shape[0], 6), shape[1]))
spread = arrays(np.float64, shapes, elements=st.one_of(st.just(0.0), st.floats(1e-30, 1e6)))
tied = arrays(np.float64, shapes, elements=st.sampled_from([0.0, 0.5, 1.0, 1.0, 3.0]))
importances = st.one_of(spread, tied).map(_with_mass_in_every_layer)
budgets = st.floats(0.0, 1.0, exclude_min=True)
protections = st.builds(Protected, sinks=st.integers(0, 2), recent=st.integers(0, 3))


def _slow_search(importance_LN: Floats, budget: float, n_protected: int) -> list[int]:
    """PrefixKV's budgets without bisection: every mass at which some layer grows is tried, in plain Python."""
    n_layers, n_tokens = importance_LN.shape
    curves = []
    for layer in importance_LN.tolist():
        ranked = sorted(layer, reverse=True)
        curves.append([sum(ranked[: j + 1]) / sum(ranked) for j in range(n_tokens)])

    def kept_at(mass: float) -> list[int]:
        return [min(n_tokens, min(j for j in range(n_tokens) if curve[j] >= mass) + 1 + n_protected) for curve in curves]

    target = round(budget * n_layers * n_tokens)
    steps = [kept_at(mass) for mass in sorted({value for curve in curves for value in curve if value <= 1.0})]
    steps = [[min(n_tokens, max(1, n_protected))] * n_layers, *steps, [n_tokens] * n_layers]
    below = max((kept for kept in steps if sum(kept) <= target), key=sum, default=steps[0])
    above = min((kept for kept in steps if sum(kept) >= target), key=sum)
    kept = list(below)
    layer = 0
    while sum(kept) < target:
        kept[layer % n_layers] += kept[layer % n_layers] < above[layer % n_layers]
        layer += 1
    return kept


def _released_search(importance_LN: Floats, budget: float) -> list[float]:
    """Forgotten tokens per layer as the released code finds them: stop within 5 tokens, rescale, truncate."""
    n_layers, n_tokens = importance_LN.shape
    curves_LN = np.cumsum(-np.sort(-importance_LN / importance_LN.sum(1, keepdims=True), axis=1), axis=1)
    target = n_layers * n_tokens * (1.0 - budget)
    low, high = 0.0, 1.0
    forgotten = np.zeros(n_layers)
    for _ in range(MAX_BISECTIONS):
        middle = (low + high) / 2
        index = np.array([np.searchsorted(curve, middle) for curve in curves_LN])
        forgotten = np.maximum(0, n_tokens - (index + 1) - 2)
        difference = forgotten.sum() - target
        if abs(difference) < 5:
            break
        if difference < 0:
            high = middle
        else:
            low = middle
    return [float(int(x)) for x in forgotten * target / forgotten.sum()]


def _attention_like(seed: int, n_layers: int = 8, n_tokens: int = 400) -> Floats:
    """Importance with a strong sink and layers that differ in concentration."""
    rng = np.random.default_rng(seed)
    importance_LN = np.stack([rng.lognormal(0.0, 0.3 + 0.3 * layer, n_tokens) for layer in range(n_layers)])
    importance_LN[:, 0] += 0.2 * importance_LN.sum(1)
    return importance_LN


@given(importances, budgets, protections, st.sampled_from(["in", "out"]))
def test_the_total_is_met_exactly_and_every_layer_keeps_its_protected_tokens(
    importance_LN: Floats, budget: float, protected: Protected, sinks: Any
) -> None:
    n_layers, n_tokens = importance_LN.shape
    kept_L = online_budget(importance_LN, budget, protected=protected, sinks_in_curve=sinks)
    floor = min(n_tokens, max(1, protected.n_tokens))
    assert kept_L.dtype == np.int64
    assert kept_L.shape == (n_layers,)
    assert kept_L.sum() == max(round(budget * n_layers * n_tokens), n_layers * floor)
    assert (kept_L >= floor).all()
    assert (kept_L <= n_tokens).all()


@given(importances, budgets, budgets, protections)
def test_a_larger_budget_never_takes_a_token_from_a_layer(
    importance_LN: Floats, one: float, other: float, protected: Protected
) -> None:
    smaller_L = online_budget(importance_LN, min(one, other), protected=protected)
    larger_L = online_budget(importance_LN, max(one, other), protected=protected)
    assert (smaller_L <= larger_L).all()


@given(importances, protections, st.sampled_from(["in", "out"]))
def test_the_whole_budget_keeps_everything(importance_LN: Floats, protected: Protected, sinks: Any) -> None:
    kept_L = online_budget(importance_LN, 1.0, protected=protected, sinks_in_curve=sinks)
    assert (kept_L == importance_LN.shape[1]).all()


@given(importances, budgets, st.lists(st.integers(-20, 20), min_size=6, max_size=6))
def test_the_scale_of_a_layers_importance_does_not_matter(importance_LN: Floats, budget: float, powers: list[int]) -> None:
    scaled_LN = importance_LN * 2.0 ** np.array(powers[: len(importance_LN)])[:, None]
    assert online_budget(scaled_LN, budget).tolist() == online_budget(importance_LN, budget).tolist()


@given(importances, budgets, st.randoms(use_true_random=False))
def test_the_order_of_the_tokens_does_not_matter(importance_LN: Floats, budget: float, random: Any) -> None:
    shuffled_LN = importance_LN.copy()
    for layer in range(len(shuffled_LN)):
        order = list(range(shuffled_LN.shape[1]))
        random.shuffle(order)
        shuffled_LN[layer] = importance_LN[layer, order]
    assert online_budget(shuffled_LN, budget).tolist() == online_budget(importance_LN, budget).tolist()


@given(st.integers(1, 12), st.integers(1, 200), budgets, st.floats(1e-6, 1e6))
def test_equal_importance_gives_equal_budgets(n_layers: int, n_tokens: int, budget: float, value: float) -> None:
    kept_L = online_budget(np.full((n_layers, n_tokens), value), budget)
    assert kept_L.max() - kept_L.min() <= 1


@given(st.integers(0, 10_000), st.integers(1, 7), st.integers(3, 120), budgets, st.integers(0, 4))
def test_the_budgets_are_those_of_a_slow_search_over_every_mass(
    seed: int, n_layers: int, n_tokens: int, budget: float, n_protected: int
) -> None:
    importance_LN = _attention_like(seed, n_layers, n_tokens)
    protected = Protected(sinks=n_protected, recent=0)
    assert online_budget(importance_LN, budget, protected=protected).tolist() == _slow_search(
        importance_LN, budget, n_protected
    )


@pytest.mark.parametrize("budget", [0.1, 0.2, 0.5, 0.8, 0.9])
def test_the_budgets_are_within_a_few_tokens_of_the_released_codes(budget: float) -> None:
    importance_LN = _attention_like(5)
    released_L = 400 - np.array(_released_search(importance_LN, budget))
    assert np.abs(online_budget(importance_LN, budget) - released_L).max() <= 6


def test_budgets_of_a_small_example_by_hand() -> None:
    importance_LN = np.array([[8.0, 1.0, 1.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0]])
    none = Protected(sinks=0, recent=0)
    curves_LN = cumulative_curves(importance_LN)
    np.testing.assert_allclose(curves_LN, [[0.8, 0.9, 1.0, 1.0, 1.0], [0.2, 0.4, 0.6, 0.8, 1.0]], atol=1e-15)
    for total, kept in [
        (2, [1, 1]),
        (3, [1, 2]),
        (4, [1, 3]),
        (5, [1, 4]),
        (6, [2, 4]),  # both grow where p passes 0.8; one token is left, and the first layer gets it
        (7, [2, 5]),
        (8, [3, 5]),
        (9, [4, 5]),
        (10, [5, 5]),
    ]:
        assert search_budgets(curves_LN, 5, total / 10, protected=none).kept.tolist() == kept
    assert 0.4 < search_budgets(curves_LN, 5, 0.4, protected=none).mass <= 0.6 + 1e-15


def test_a_concentrated_layer_keeps_less_than_a_flat_one() -> None:
    kept_L = online_budget(_attention_like(2, n_layers=5), 0.3)
    assert kept_L.tolist() == sorted(kept_L, reverse=True)
    assert kept_L[0] > 2 * kept_L[-1]


def test_leaving_the_sink_out_of_the_curve_takes_its_mass_out_of_the_cut() -> None:
    importance_LN = np.ones((2, 100))
    importance_LN[0, 0] = 100.0
    with_sink_L = online_budget(importance_LN, 0.5)
    without_sink_L = online_budget(importance_LN, 0.5, sinks_in_curve="out")
    assert with_sink_L[0] < 40
    assert without_sink_L.tolist() == [50, 50]


def test_a_prompt_no_longer_than_the_protected_tokens_is_kept_whole() -> None:
    protected = Protected(sinks=4, recent=2)
    options: tuple[SinkCurve, ...] = ("in", "out")
    for sinks in options:
        assert online_budget(np.ones((3, 5)), 0.1, protected=protected, sinks_in_curve=sinks).tolist() == [5, 5, 5]
        assert online_budget(np.ones((3, 4)), 0.1, protected=protected, sinks_in_curve=sinks).tolist() == [4, 4, 4]


@pytest.mark.parametrize(
    ("importance_LN", "words"),
    [
        (np.array([[1.0, np.nan, 2.0]]), "negative or not finite"),
        (np.array([[1.0, np.inf, 2.0]]), "negative or not finite"),
        (np.array([[1.0, -1.0, 2.0]]), "negative or not finite"),
        (np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), "only zeros in layer 1"),
        (np.ones(3), "wrong shape"),
        (np.ones((0, 3)), "wrong shape"),
    ],
)
def test_importance_that_ranks_nothing_is_refused(importance_LN: Floats, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        online_budget(importance_LN, 0.5)


@pytest.mark.parametrize("budget", [0.0, -0.1, 1.1, float("nan")])
def test_a_budget_that_is_no_share_is_refused(budget: float) -> None:
    with pytest.raises(UsageError, match="share of tokens to keep"):
        online_budget(np.ones((2, 9)), budget)


def _scorer(token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """Importance that depends on the tokens, in the type a runtime gives."""
    return _attention_like(sum(token_ids), n_layers=3, n_tokens=len(token_ids)).astype(np.float32)


PROMPTS = [list(range(40, 140)), list(range(7, 257)), list(range(60))]


def _calibrated(budget: float = 0.3, **changes: Any) -> Recipe:
    given_values: dict[str, Any] = {"score": MASS, "model": MODEL, "source": "a test", "seed": 4, "budget": budget, **changes}
    return calibrate_prefixkv(PROMPTS, _scorer, **given_values)


def test_a_recipe_is_the_mean_over_its_samples() -> None:
    recipe = _calibrated()
    samples = recipe.calibration.samples
    assert [sample.n_tokens for sample in samples] == [100, 250, 60]
    for token_ids, sample in zip(PROMPTS, samples, strict=True):
        kept_L = online_budget(_scorer(token_ids), 0.3)
        np.testing.assert_allclose(sample.kept, kept_L / len(token_ids), atol=1e-6)
    np.testing.assert_allclose(recipe.kept, np.mean([sample.kept for sample in samples], axis=0), atol=1e-6)
    assert np.mean(recipe.kept) == pytest.approx(0.3, abs=1e-5)
    assert recipe.mass == pytest.approx(np.mean([sample.mass for sample in samples]))
    assert (recipe.calibration.source, recipe.calibration.seed, recipe.score, recipe.model) == ("a test", 4, MASS, MODEL)


def test_a_recipe_from_one_sample_keeps_that_samples_very_counts() -> None:
    for budget in (0.05, 0.31, 0.5, 0.77, 1.0):
        (recipe,) = calibrate_prefixkv_budgets(
            PROMPTS[1:2], _scorer, budgets=[budget], score=MASS, model=MODEL, source="a test"
        )
        assert recipe.kept_tokens(250) == online_budget(_scorer(PROMPTS[1]), budget).tolist()


def test_the_curves_are_the_mean_curves_on_a_fixed_grid() -> None:
    recipe = _calibrated()
    assert recipe.curves is not None
    assert recipe.curves.sinks == "in"
    assert len(recipe.curves.kept_share) == 41
    means_L = np.mean([cumulative_curves(_scorer(ids))[:, len(ids) // 4 - 1] for ids in PROMPTS], axis=0)
    quarter = recipe.curves.kept_share.index(0.25)
    np.testing.assert_allclose([curve[quarter] for curve in recipe.curves.layers], means_L, atol=2e-2)
    assert {curve[0] for curve in recipe.curves.layers} == {0.0}
    assert {curve[-1] for curve in recipe.curves.layers} == {1.0}
    out = _calibrated(sinks_in_curve="out").curves
    assert out is not None
    assert out.sinks == "out"


def test_several_budgets_in_one_pass_are_the_same_recipes() -> None:
    asked: list[int] = []

    def counting(token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
        asked.append(len(token_ids))
        return _scorer(token_ids)

    recipes = calibrate_prefixkv_budgets(
        PROMPTS, counting, budgets=(0.1, 0.3, 0.9), score=MASS, model=MODEL, source="a test", seed=4
    )
    assert recipes == [_calibrated(budget) for budget in (0.1, 0.3, 0.9)]
    assert asked == [100, 250, 60]


def test_progress_is_told_after_each_prompt() -> None:
    told: list[tuple[int, int]] = []
    _calibrated(on_sample=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_calibration_refuses_what_it_cannot_use() -> None:
    with pytest.raises(UsageError, match="no prompts"):
        calibrate_prefixkv([], _scorer, budget=0.5, score=MASS, model=MODEL, source="")
    with pytest.raises(UsageError, match="prompt 2 is too short"):
        calibrate_prefixkv([[1, 2, 3], [1, 2]], _scorer, budget=0.5, score=MASS, model=MODEL, source="")
    for wrong in (np.ones((2, 3)), np.ones((3, 4)), np.ones(3)):
        with pytest.raises(UsageError, match="prompt 1 has the wrong shape"):
            calibrate_prefixkv([[1, 2, 3]], lambda _ids, wrong=wrong: wrong, budget=0.5, score=MASS, model=MODEL, source="")  # type: ignore[misc]
    with pytest.raises(UsageError, match="share of tokens to keep"):
        _calibrated(budget=1.5)
