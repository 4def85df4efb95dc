"""LU-KV's calibration: hulls are those of plain geometry, evictions cost as little as any that remove as many tokens."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from trt_kv.calibration.lukv import Usefulness, calibrate_lukv, evictions, hull_slopes
from trt_kv.errors import UsageError
from trt_kv.recipe import Protected, Recipe, RecipeModel, RecipeScore

SCORE = RecipeScore(name="window", window=8, heads="own")
NOTHING = Protected(sinks=0, recent=0)
uses = st.lists(st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0.0, 100.0)), min_size=1, max_size=25).map(np.array)
small = arrays(np.float64, st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(3, 5)), elements=st.integers(0, 9))


def slow_hull(costs: Sequence[float]) -> list[float]:
    """The lower convex hull of points (j, costs[j]), at every j: the least of all chords between points around it."""
    n = len(costs)
    return [
        min(
            costs[a] + (costs[b] - costs[a]) * (j - a) / (b - a) if b > a else costs[j]
            for a in range(j + 1)
            for b in range(j, n)
        )
        for j in range(n)
    ]


@given(uses)
def test_slopes_are_those_of_the_hull(use_E: np.ndarray) -> None:
    slopes = hull_slopes(use_E)
    costs = np.concatenate(([0.0], np.cumsum(use_E)))
    np.testing.assert_allclose(np.concatenate(([0.0], np.cumsum(slopes))), slow_hull(costs.tolist()), atol=1e-9, rtol=1e-9)
    assert (np.diff(slopes) >= -1e-12).all()


@given(small, st.integers(0, 20))
def test_no_other_evictions_of_as_many_tokens_cost_less_along_the_hulls(use_LKN: np.ndarray, n_removed: int) -> None:
    """All ways to remove so many tokens from the heads are tried. Here the ranking is another than the use."""
    rng = np.random.default_rng(3)
    ranking = rng.permuted(np.broadcast_to(np.arange(use_LKN.shape[2]), use_LKN.shape), axis=2).astype(float)
    n_tokens = use_LKN.shape[2]
    hulls = [
        np.concatenate(([0.0], np.cumsum(hull_slopes(np.asarray(use[np.argsort(order)][: n_tokens - 1], float)))))
        for use, order in zip(use_LKN.reshape(-1, n_tokens), ranking.reshape(-1, n_tokens), strict=True)
    ]
    found = evictions(Usefulness(ranking=ranking, use=use_LKN), NOTHING)
    share = min(n_removed, len(found.head_E)) / use_LKN.size
    removed = found.removed(share).reshape(-1)
    ways = [way for way in itertools.product(range(n_tokens), repeat=len(hulls)) if sum(way) == removed.sum()]
    cheapest = min(sum(hull[n] for hull, n in zip(hulls, way, strict=True)) for way in ways)
    assert sum(hull[n] for hull, n in zip(hulls, removed, strict=True)) == pytest.approx(cheapest)
    assert removed.sum() == min(n_removed, len(found.head_E))


@given(small)
def test_where_the_ranking_is_the_use_no_evictions_cost_less_at_all(use_LKN: np.ndarray) -> None:
    found = evictions(Usefulness(ranking=use_LKN, use=use_LKN), NOTHING)
    for n in range(len(found.head_E) + 1):
        ways = itertools.product(range(use_LKN.shape[2]), repeat=use_LKN.shape[0] * use_LKN.shape[1])
        heads = np.sort(use_LKN.reshape(-1, use_LKN.shape[2]), axis=1)
        cheapest = min(sum(use[:gone].sum() for use, gone in zip(heads, way, strict=True)) for way in ways if sum(way) == n)
        assert found.use_E[:n].sum() == pytest.approx(cheapest)


def skewed(seed: int, n_tokens: int = 200) -> Usefulness:
    """Two layers of three heads, of which the later ones are of less use."""
    rng = np.random.default_rng(seed)
    use = rng.random((2, 3, n_tokens)) ** 6 * np.array([8.0, 1.0, 0.1])[None, :, None]
    return Usefulness(ranking=use + 0.05 * rng.random(use.shape), use=use)


def calibrated(budget: float, **options: object) -> Recipe:
    lengths = {1: 150, 2: 200}
    return calibrate_lukv(
        [[seed] * n for seed, n in lengths.items()],
        lambda ids: skewed(ids[0], len(ids)),
        budget=budget,
        score=SCORE,
        model=RecipeModel(name="tiny", digest="sha256:01", n_layers=2 + len(options.get("windowed_layers", ()))),  # type: ignore[arg-type]
        source="a test",
        protected=Protected(sinks=4, recent=1),
        **options,  # type: ignore[arg-type]
    )


@given(st.integers(6, 99))
def test_the_mean_over_heads_is_the_budget(percent: int) -> None:
    recipe = calibrated(percent / 100)
    assert recipe.heads is not None
    shares = np.array(recipe.heads.at(percent / 100))
    assert shares.mean() == pytest.approx(percent / 100, abs=0.002)
    assert recipe.kept == pytest.approx(shares.mean(1), abs=1e-5)


def test_heads_of_less_use_keep_less_and_none_grows_as_the_budget_falls() -> None:
    recipe = calibrated(0.3)
    assert recipe.heads is not None
    assert recipe.mass is not None
    table = np.array(recipe.heads.rows)
    assert (np.diff(table, axis=0) <= 1e-9).all()
    for row in (30, 60, 80):
        assert (np.diff(table[row].mean(0)) < 0).all()
    assert 0.8 < recipe.mass < 1.0
    assert [sample.n_tokens for sample in recipe.calibration.samples] == [150, 200]


def test_every_head_keeps_its_protected_tokens_and_a_hundredth() -> None:
    found = evictions(skewed(1, 1200), Protected(sinks=4, recent=1))
    assert (1200 - found.removed(1.0) == 12).all()
    few = evictions(skewed(1, 20), Protected(sinks=4, recent=1))
    assert (20 - few.removed(1.0) == 5).all()


def test_evictions_that_cost_the_same_are_taken_from_all_heads_in_turn() -> None:
    nothing = np.zeros((2, 2, 50))
    found = evictions(Usefulness(ranking=nothing, use=nothing), NOTHING)
    removed = found.removed(0.31)
    assert removed.sum() == 62
    assert removed.max() - removed.min() <= 1


def test_layers_with_a_window_keep_everything() -> None:
    recipe = calibrated(0.4, windowed_layers=(1,))
    assert recipe.heads is not None
    table = np.array(recipe.heads.rows)
    assert (table[:, 1] == 1.0).all()
    assert table[59][[0, 2]].mean() == pytest.approx(0.4, abs=0.002)


def test_prompts_and_scores_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="no prompts"):
        calibrate_lukv(
            [], skewed_of, budget=0.5, score=SCORE, model=RecipeModel(name="tiny", digest="x", n_layers=2), source=""
        )
    with pytest.raises(UsageError, match="too short"):
        calibrate_lukv(
            [[1, 1]], skewed_of, budget=0.5, score=SCORE, model=RecipeModel(name="tiny", digest="x", n_layers=2), source=""
        )
    for bad in (np.full((1, 1, 4), -1.0), np.full((1, 1, 4), np.nan)):
        with pytest.raises(UsageError, match="invalid values"):
            Usefulness(ranking=np.ones((1, 1, 4)), use=bad)
    with pytest.raises(UsageError, match="wrong shape"):
        Usefulness(ranking=np.ones((1, 1, 4)), use=np.ones((1, 2, 4)))


def skewed_of(ids: Sequence[int]) -> Usefulness:
    return skewed(ids[0], len(ids))
