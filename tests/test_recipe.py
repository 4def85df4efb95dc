"""What a recipe file promises: it comes back as it was, reads well, and nothing wrong in it is accepted."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_kv.errors import RecipeError, UsageError
from trt_kv.published_recipe import published_name, recipe_from_published, write_published
from trt_kv.recipe import (
    CalibrationRecord,
    Curves,
    Protected,
    Recipe,
    RecipeModel,
    RecipeSample,
    RecipeScore,
)

MODEL = RecipeModel(name="llama3-tiny", digest="sha256:00ff", n_layers=3)
RECIPE = Recipe(
    method="prefixkv",
    score=RecipeScore(name="window", window=32),
    budget=0.4,
    kept=(0.75, 0.2, 0.25),
    mass=0.875,
    protected=Protected(sinks=1, recent=1),
    model=MODEL,
    calibration=CalibrationRecord(
        source="synthetic English",
        seed=7,
        samples=(
            RecipeSample(n_tokens=100, kept=(0.8, 0.2, 0.2), mass=0.9),
            RecipeSample(n_tokens=120, kept=(0.7, 0.2, 0.3), mass=0.85),
        ),
    ),
    curves=Curves(sinks="in", kept_share=(0.0, 0.5, 1.0), layers=((0.0, 0.6, 1.0), (0.0, 0.9, 1.0), (0.0, 0.8, 1.0))),
    created_by="trt-kv 0.1.0",
)
shares = st.floats(min_value=0.0, max_value=1.0, exclude_min=True)


def test_a_saved_recipe_loads_as_it_was(tmp_path: Path) -> None:
    RECIPE.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == RECIPE
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.json"]


@given(st.lists(shares, min_size=3, max_size=3), shares)
def test_any_shares_survive_the_file_bit_for_bit(kept: list[float], budget: float) -> None:
    text = json.dumps({**RECIPE.to_json(), "kept": kept, "budget": budget})
    recipe = Recipe.from_json(json.loads(text))
    assert Recipe.from_json(json.loads(recipe.to_text())) == recipe
    assert recipe.kept == tuple(kept)


def test_the_file_has_one_line_per_layer_and_per_sample() -> None:
    lines = [line.strip().rstrip(",") for line in RECIPE.to_text().splitlines()]
    assert '"kept": [0.75, 0.2, 0.25]' in lines
    assert "[0.0, 0.9, 1.0]" in lines
    assert '{"n_tokens": 100, "kept": [0.8, 0.2, 0.2], "mass": 0.9}' in lines
    assert lines[1:3] == ['"format": "trt-kv-recipe"', '"version": 1']


def _set(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


def _drop(*path: str) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        del data[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("format", to="recipe"), "not a trt-kv recipe"),
        (_set("version", to=2), "version"),
        (_set("version", to=True), "version"),
        (_drop("version"), "version"),
        (_drop("kept"), "lacks fields"),
        (_drop("score", "window"), "recipe.score lacks fields"),
        (_set("keep", to=[1.0]), "unknown fields"),
        (_set("model", "layers", to=3), "recipe.model has unknown fields"),
        (_set("method", to="suffixkv"), "method"),
        (_set("kept", to=[0.5, 0.5]), "one value per layer"),
        (_set("calibration", "samples", 1, "kept", to=[0.5]), r"samples\[1\].kept does not have one value per layer"),
        (_set("curves", "layers", to=[[0.0, 0.5, 1.0]]), "curves.layers does not have one value per layer"),
        (_set("curves", "layers", 2, to=[0.0, 1.0]), r"curves.layers\[2\] has the wrong length"),
        (_set("curves", "layers", 0, to=[0.0, 0.9, 0.8]), r"curves.layers\[0\] is not a cumulative curve"),
        (_set("curves", "sinks", to="sideways"), "sinks"),
        (_set("kept", 1, to=0.0), "not a kept share"),
        (_set("kept", 1, to=1.5), "not a kept share"),
        (_set("kept", 1, to=-0.1), "not a kept share"),
        (_set("kept", 1, to=math.nan), r"recipe.kept\[1\] is not a number"),
        (_set("kept", 1, to=math.inf), r"recipe.kept\[1\] is not a number"),
        (_set("kept", 1, to=10**400), r"recipe.kept\[1\] is not a number"),
        (_set("kept", 1, to="half"), r"recipe.kept\[1\] is not a number"),
        (_set("kept", 1, to=True), r"recipe.kept\[1\] is not a number"),
        (_set("kept", to=0.5), "recipe.kept is not a list"),
        (_set("budget", to=0), "budget"),
        (_set("mass", to=1.01), "mass"),
        (_set("score", "name", to="rank"), "score is unknown"),
        (_set("score", "window", to=None), "window"),
        (_set("score", "window", to=32.0), "recipe.score.window has the wrong type"),
        (_set("score", "name", to="mass"), "window"),
        (_set("protected", "sinks", to=-1), "protected"),
        (_set("protected", "sinks", to=True), "wrong type"),
        (_set("model", "digest", to=""), "does not identify its model"),
        (_set("model", to="llama3"), "recipe.model is not a JSON object"),
        (_set("calibration", "samples", 0, "n_tokens", to=0), "no tokens"),
    ],
)
def test_whatever_is_wrong_in_a_recipe_is_named(change: Callable[[Any], None], words: str, tmp_path: Path) -> None:
    data = json.loads(RECIPE.to_text())
    change(data)
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(data))
    with pytest.raises(RecipeError, match=words) as caught:
        Recipe.load(path)
    assert str(path) in caught.value.what


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000])
def test_a_file_that_is_not_json_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_bytes(content)
    with pytest.raises(RecipeError, match="not JSON"):
        Recipe.load(tmp_path / "recipe.json")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no recipe at this path"):
        Recipe.load(tmp_path / "recipe.json")
    with pytest.raises(RecipeError, match="cannot read"):
        Recipe.load(tmp_path)


def test_a_recipe_refuses_another_model() -> None:
    RECIPE.check_model(digest="sha256:00ff", n_layers=3)
    with pytest.raises(RecipeError, match="number of layers") as caught:
        RECIPE.check_model(digest="sha256:00ff", n_layers=4)
    assert caught.value.fix is not None
    with pytest.raises(RecipeError, match="digest"):
        RECIPE.check_model(digest="sha256:01ff", n_layers=3)


@given(st.integers(0, 10_000))
def test_every_layer_keeps_its_share_rounded_and_never_less_than_the_protected_tokens(n_tokens: int) -> None:
    counts = RECIPE.kept_tokens(n_tokens)
    for share, count in zip(RECIPE.kept, counts, strict=True):
        assert min(n_tokens, 2) <= count <= n_tokens
        assert count == min(n_tokens, 2) or abs(count - share * n_tokens) <= 0.5 + 1e-9


def test_halves_are_rounded_to_the_even_number_of_evicted_tokens() -> None:
    assert RECIPE.kept_tokens(10) == [8, 2, 2]  # evicts round(2.5) = 2, 8 and round(7.5) = 8
    assert RECIPE.kept_tokens(1) == [1, 1, 1]
    assert RECIPE.kept_tokens(0) == [0, 0, 0]
    with pytest.raises(UsageError):
        RECIPE.kept_tokens(-1)


@given(st.lists(st.integers(0, 10**15 - 1).map(lambda digits: digits / 10**15), min_size=1, max_size=80))
def test_a_published_list_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, forgotten: list[float]) -> None:
    ratio = round(sum(forgotten) / len(forgotten), 3)
    if ratio == 1.0:
        return
    folder = tmp_path_factory.mktemp("published")
    path = folder / f"prefixkv_some_model_{ratio}.json"
    path.write_text(json.dumps(forgotten))
    recipe = recipe_from_published(path, model=RecipeModel(name="some-model", digest="sha256:1", n_layers=len(forgotten)))
    assert recipe.budget == pytest.approx(1 - ratio)
    assert json.loads(write_published(recipe, folder).read_text()) == forgotten
    assert Recipe.from_json(json.loads(recipe.to_text())) == recipe


def test_an_exported_recipe_comes_back_with_the_same_shares(tmp_path: Path) -> None:
    path = write_published(RECIPE, tmp_path)
    assert path.name == "prefixkv_llama3-tiny_0.6.json"
    back = recipe_from_published(path, model=MODEL, score=RECIPE.score)
    assert (back.kept, back.budget, back.score, back.model) == (RECIPE.kept, 0.4, RECIPE.score, MODEL)
    assert back.mass is None
    assert back.curves is None


@pytest.mark.parametrize(
    ("model", "budget", "name"),
    [
        ("7b", 0.2, "prefixkv_7b_0.8.json"),
        ("7b", 1.0, "prefixkv_7b_0.0.json"),
        ("7b", 0.05, "prefixkv_7b_0.95.json"),
        ("meta-llama/Llama 3", 0.5, "prefixkv_meta-llama-Llama-3_0.5.json"),
    ],
)
def test_published_files_are_named_after_the_forgotten_share(model: str, budget: float, name: str) -> None:
    assert published_name(model, budget) == name


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("recipe.json", "[0.5, 0.5, 0.5]", "file name"),
        ("prefixkv_m_0.8.json", "[0.2, 0.2, 0.2]", "FORGOTTEN"),
        ("prefixkv_m_0.5.json", "[0.5, 0.5]", "one value per layer"),
        ("prefixkv_m_0.5.json", "[0.25, 0.25, 1.0]", "not a published recipe"),
        ("prefixkv_m_0.5.json", "[0.5, NaN, 0.5]", "not a published recipe"),
        ("prefixkv_m_0.5.json", '[0.5, "0.5", 0.5]', "not a published recipe"),
        ("prefixkv_m_0.5.json", "[]", "not a published recipe"),
        ("prefixkv_m_0.5.json", "{}", "not a published recipe"),
        ("prefixkv_m_0.5.json", "[", "not JSON"),
    ],
)
def test_a_wrong_published_list_is_refused(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=words):
        recipe_from_published(tmp_path / name, model=MODEL)


def test_a_published_list_given_as_a_recipe_is_told_how_to_be_imported(tmp_path: Path) -> None:
    (tmp_path / "recipe.json").write_text("[0.5, 0.5, 0.5]")
    with pytest.raises(RecipeError, match="recipe_from_published"):
        Recipe.load(tmp_path / "recipe.json")


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_save_leaves_the_old_recipe_and_nothing_else(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "recipe.json"
    RECIPE.save(path)
    before = path.read_bytes()

    def fail(_descriptor: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((RecipeError, KeyboardInterrupt)) as caught:
        RECIPE.save(path)
    assert isinstance(caught.value, KeyboardInterrupt) or "No space left" in str(caught.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_saving_into_a_missing_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot write"):
        RECIPE.save(tmp_path / "nowhere" / "recipe.json")


def test_the_recipe_format_imports_nothing_heavy() -> None:
    code = "import sys, trt_kv.recipe; print([m for m in ('numpy', 'torch', 'onnx', 'matplotlib') if m in sys.modules])"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
