"""What a recipe's picture promises: a PNG beside the recipe, for any number of layers, made without touching global state."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from trt_kv.calibration.prefixkv import calibrate_prefixkv
from trt_kv.calibration.recipe_plot import picture_from_recipe
from trt_kv.errors import MissingDependencyError, TrtKvError
from trt_kv.published_recipe import recipe_from_published, write_published
from trt_kv.recipe import Protected, Recipe, RecipeModel, RecipeScore


def _recipe(n_layers: int, n_samples: int = 3) -> Recipe:
    rng = np.random.default_rng(n_layers)
    spread = np.linspace(0.2, 2.0, n_layers)[:, None]
    return calibrate_prefixkv(
        [range(90 + sample) for sample in range(n_samples)],
        lambda token_ids: np.exp(rng.normal(size=(n_layers, len(token_ids))) * spread),
        budget=0.3,
        score=RecipeScore(name="window", window=16),
        model=RecipeModel(name="some-model", digest="sha256:1", n_layers=n_layers),
        source="a test",
        protected=Protected(sinks=1, recent=1),
    )


@pytest.mark.parametrize(("n_layers", "n_samples"), [(1, 1), (2, 3), (8, 3), (80, 2)])
def test_a_picture_is_drawn_for_any_number_of_layers(n_layers: int, n_samples: int, tmp_path: Path) -> None:
    path = tmp_path / "recipe.png"
    picture_from_recipe(_recipe(n_layers, n_samples), path)
    image = matplotlib.image.imread(path)
    assert image.shape[:2] == (660, 1650)
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20
    assert list(tmp_path.iterdir()) == [path]


def test_an_imported_list_without_curves_has_one_panel(tmp_path: Path) -> None:
    recipe = _recipe(8)
    imported = recipe_from_published(write_published(recipe, tmp_path), model=recipe.model)
    picture_from_recipe(imported, tmp_path / "recipe.png")
    assert matplotlib.image.imread(tmp_path / "recipe.png").shape[:2] == (660, 900)


def test_the_same_recipe_gives_the_same_file(tmp_path: Path) -> None:
    recipe = _recipe(3)
    picture_from_recipe(recipe, tmp_path / "one.png")
    picture_from_recipe(recipe, tmp_path / "two.png")
    picture_from_recipe(dataclasses.replace(recipe, kept=(0.2, 0.2, 0.5)), tmp_path / "other.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "other.png").read_bytes()


def test_a_picture_that_cannot_be_written_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(TrtKvError, match="cannot write the recipe's picture"):
        picture_from_recipe(_recipe(2), tmp_path / "nowhere" / "recipe.png")


def test_without_matplotlib_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        picture_from_recipe(_recipe(2), tmp_path / "recipe.png")
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_imported_only_to_draw_and_pyplot_never(tmp_path: Path) -> None:
    _recipe(2).save(tmp_path / "recipe.json")
    code = f"""
import sys
from pathlib import Path
from trt_kv.calibration.recipe_plot import picture_from_recipe
from trt_kv.recipe import Recipe
print("matplotlib" in sys.modules)
picture_from_recipe(Recipe.load(Path({str(tmp_path / "recipe.json")!r})), Path({str(tmp_path / "recipe.png")!r}))
print("matplotlib.pyplot" in sys.modules)
"""
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
