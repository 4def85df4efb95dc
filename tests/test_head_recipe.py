"""Recipes with shares of KV heads: version 2 of the format, and kvpress's curves."""

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_kv.calibration.head_curves import recipe_from_curves, write_curves
from trt_kv.errors import RecipeError
from trt_kv.head_shares import N_ROWS, HeadShares, means
from trt_kv.recipe import CREATED_BY, CalibrationRecord, Protected, Recipe, RecipeModel, RecipeScore

MODEL = RecipeModel(name="tiny", digest="sha256:01", n_layers=3)
SCORE = RecipeScore(name="window", window=8, heads="own")
REMOVED = np.clip(np.linspace(0.01, 0.99, N_ROWS)[:, None, None] * np.array([[0.5, 1.0], [0.9, 0.7], [1.0, 1.0]]), 0, 1)
"""[99, 3 layers, 2 KV heads]."""


def shares_of(kept: np.ndarray) -> HeadShares:
    return HeadShares(rows=tuple(tuple(map(tuple, row)) for row in kept.round(6).tolist()))


def recipe_with(budget: float = 0.4) -> Recipe:
    heads = shares_of(1.0 - REMOVED)
    return Recipe(
        method="lukv",
        score=SCORE,
        budget=budget,
        kept=means(heads.at(budget)),
        mass=0.9,
        protected=Protected(sinks=4, recent=1),
        model=MODEL,
        calibration=CalibrationRecord(source="a test", seed=0, samples=()),
        curves=None,
        heads=heads,
        created_by=CREATED_BY,
    )


def imported(path: Path, budget: float = 0.4) -> Recipe:
    return recipe_from_curves(path, model=MODEL, n_kv_heads=2, score=SCORE, budget=budget, protected=Protected())


def saved(tmp_path: Path, array: np.ndarray) -> Path:
    path = tmp_path / "curves.npy"
    np.save(path, array)
    return path


def test_a_recipe_of_heads_survives_its_file_as_version_2(tmp_path: Path) -> None:
    recipe, path = recipe_with(), tmp_path / "recipe.json"
    recipe.save(path)
    assert json.loads(path.read_text())["version"] == 2
    assert Recipe.load(path) == recipe


def test_a_recipe_of_layers_is_written_as_before(tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe_with(), method="prefixkv", heads=None)
    data = recipe.to_json()
    assert (data["version"], "heads" in data) == (1, False)
    assert list(data) == [
        *("format", "version", "method", "score", "budget", "kept", "mass", "protected", "model", "calibration", "curves"),
        "created_by",
    ]
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe


def test_the_two_versions_are_not_mixed() -> None:
    data = recipe_with().to_json()
    layers = {name: value for name, value in data.items() if name != "heads"}
    for mixed in ({**data, "version": 1}, {**layers, "version": 2}, {**data, "heads": None}):
        with pytest.raises(RecipeError, match="shares of KV heads"):
            Recipe.from_json(mixed)
    with pytest.raises(RecipeError, match="do not fit together"):
        Recipe.from_json({**data, "method": "prefixkv"})
    with pytest.raises(RecipeError, match="cannot read"):
        Recipe.from_json({**data, "version": 4})
    with pytest.raises(RecipeError, match="not the means"):
        Recipe.from_json({**data, "kept": [0.1, 0.2, 0.3]})


def test_shares_of_the_cache_are_of_layers_or_of_heads() -> None:
    recipe = recipe_with(0.5)
    assert recipe.shares_of_cache(heads_apart=1) == list(recipe.kept)
    assert recipe.shares_of_cache(heads_apart=2) == pytest.approx((1 - REMOVED[49]).reshape(-1), abs=1e-6)
    with pytest.raises(RecipeError, match="another number of KV heads"):
        recipe.shares_of_cache(heads_apart=3)
    of_layers = dataclasses.replace(recipe, method="prefixkv", heads=None, kept=(0.5, 0.4, 0.6))
    assert of_layers.shares_of_cache(heads_apart=2) == [0.5, 0.5, 0.4, 0.4, 0.6, 0.6]


@given(st.floats(0.0, 1.0, exclude_min=True))
def test_between_the_rows_shares_go_on_in_proportion(kept: float) -> None:
    shares = np.array(recipe_with().heads.at(kept))  # type: ignore[union-attr]
    assert ((shares > 0) & (shares <= 1)).all()
    removed = np.arange(100) / 100
    table = np.concatenate((np.ones((1, 3, 2)), (1 - REMOVED).round(6)))
    if kept >= 0.01:
        expected = [[np.interp(1 - kept, removed, table[:, layer, head]) for head in range(2)] for layer in range(3)]
        np.testing.assert_allclose(shares, expected, atol=1e-9)


def test_another_budget_is_another_row() -> None:
    recipe = recipe_with(0.4).with_budget(0.7)
    assert recipe == dataclasses.replace(recipe_with(0.7), mass=None)
    with pytest.raises(RecipeError, match="of one budget"):
        dataclasses.replace(recipe, method="prefixkv", heads=None).with_budget(0.2)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ((((0.5,),),) * 98, "not of all budgets"),
        ((((0.5,),),) * 98 + (((0.5, 0.5),),), "not a table"),
        ((((0.5,), ()),) * 99, "not a table"),
        (((),) * 99, "not a table"),
        ((((0.0,),),) * 99, "no kept share"),
        ((((1.5,),),) * 99, "no kept share"),
    ],
)
def test_tables_that_are_none_are_refused(rows: tuple[tuple[tuple[float, ...], ...], ...], reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        HeadShares(rows=rows)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, ">f4"])
def test_published_curves_are_read_and_written(tmp_path: Path, dtype: str) -> None:
    recipe = imported(saved(tmp_path, REMOVED.astype(dtype)))
    assert recipe.heads is not None
    np.testing.assert_allclose(recipe.heads.rows, 1 - REMOVED, atol=2e-6)
    again = imported(write_curves(recipe, recipe.heads, tmp_path))
    assert again.heads is not None
    np.testing.assert_allclose(again.heads.rows, recipe.heads.rows, atol=2e-6)


def test_a_head_that_loses_all_keeps_its_protected_tokens(tmp_path: Path) -> None:
    removed = REMOVED.copy()
    removed[-1, 0, 0] = 1.0
    recipe = imported(saved(tmp_path, removed))
    assert recipe.heads is not None
    assert recipe.heads.rows[-1][0][0] == 1e-6


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (REMOVED[:98], "not of this model"),
        (REMOVED[:, :2], "not of this model"),
        (REMOVED[0], "not of this model"),
        (REMOVED * 1.5, "no shares"),
        (REMOVED - 0.1, "no shares"),
        (np.where(REMOVED > 0.9, np.nan, REMOVED), "no shares"),
        (REMOVED[::-1], "descend"),
        (np.ones((99, 3, 2), np.int64), "array of floats"),
        (np.ones((99, 3, 2), np.complex64), "array of floats"),
    ],
)
def test_arrays_that_are_no_curves_are_refused(tmp_path: Path, array: np.ndarray, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        imported(saved(tmp_path, array))


def test_files_with_python_objects_and_missing_ones_are_refused(tmp_path: Path) -> None:
    objects = tmp_path / "objects.npy"
    np.save(objects, np.array([{"a": 1}], object), allow_pickle=True)
    plain = tmp_path / "plain.npy"
    plain.write_text("[0.5]")
    archive = tmp_path / "archive.npy"
    with archive.open("wb") as file:
        np.savez(file, REMOVED)
    for path in (objects, plain, archive):
        with pytest.raises(RecipeError, match="not a numpy array of numbers"):
            imported(path)
    for path in (tmp_path / "none.npy", tmp_path):
        with pytest.raises(RecipeError, match="cannot read"):
            imported(path)


@given(data=st.data())
def test_damaged_files_are_refused_or_other_curves(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing but a ``RecipeError`` leaves the reader, whatever bytes are changed or missing."""
    content = io.BytesIO()
    np.save(content, REMOVED.astype(np.float32))
    damaged = bytearray(content.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, 140))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("damaged") / "curves.npy"
    path.write_bytes(damaged[: data.draw(st.sampled_from([len(damaged), 5, 60, 127, 500]))])
    try:
        recipe = imported(path)
    except RecipeError:
        return
    assert recipe.heads is not None
