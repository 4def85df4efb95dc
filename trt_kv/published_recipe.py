"""PrefixKV's published lists: the FORGOTTEN fraction of each layer, in a file whose name ends in their mean."""

import json
import re
from pathlib import Path

from trt_kv.errors import RecipeError
from trt_kv.json_file import read_json, write_atomically
from trt_kv.recipe import CREATED_BY, CalibrationRecord, Protected, Recipe, RecipeModel, RecipeScore


def write_published(recipe: Recipe, folder: Path) -> Path:
    """Write ``recipe`` into ``folder`` as a JSON list of L FORGOTTEN fractions. Returns the file's path."""
    path = folder / published_name(recipe.model.name, recipe.budget)
    text = json.dumps([_complement(share) for share in recipe.kept]) + "\n"
    write_atomically(path, text.encode(), kind="published recipe", error=RecipeError)
    return path


def published_name(model_name: str, budget: float) -> str:
    """``prefixkv_{model}_{ratio}.json``; the ratio is the forgotten fraction, with as many decimals as it needs."""
    whole, _, decimals = f"{1.0 - budget:.6f}".partition(".")
    return f"prefixkv_{re.sub(r'[^A-Za-z0-9.-]+', '-', model_name)}_{whole}.{decimals.rstrip('0') or '0'}.json"


def recipe_from_published(path: Path, *, model: RecipeModel, score: RecipeScore | None = None) -> Recipe:
    """Read a published PrefixKV list (L FORGOTTEN fractions) whose file name ends in ``_{forgotten ratio}.json``.

    The list does not identify its checkpoint, so the recipe is bound to ``model``. ``score`` None: the published "mass".
    """
    data = read_json(path, kind="published recipe", error=RecipeError)
    named = re.search(r"_(\d(?:\.\d+)?)\.json$", path.name)
    if named is None:
        raise RecipeError("the file name does not contain the ratio", got=path.name, expected="prefixkv_{model}_{ratio}.json")
    if not isinstance(data, list) or not data or not all(type(x) in (int, float) and 0.0 <= x < 1.0 for x in data):
        raise RecipeError(f"{path} is not a published recipe", expected="a JSON list of forgotten fractions in [0, 1)")
    forgotten = float(named.group(1))
    mean = sum(data) / len(data)
    if abs(mean - forgotten) > 0.1:
        raise RecipeError(
            f"the list in {path} does not fit its file name",
            got=f"a mean of {mean:.3f}",
            expected=f"a mean forgotten fraction of about {forgotten}",
            fix="published lists hold FORGOTTEN fractions; were these kept ones?",
        )
    return Recipe(
        method="prefixkv",
        score=score or RecipeScore(name="mass"),
        budget=_complement(forgotten),
        kept=tuple(_complement(fraction) for fraction in data),
        mass=None,
        protected=Protected(),
        model=model,
        calibration=CalibrationRecord(source=f"published list {path.name}", seed=None, samples=()),
        curves=None,
        created_by=CREATED_BY,
    )


def _complement(fraction: float) -> float:
    """1 - fraction, rounded so that the complement of the complement is the fraction again (up to 15 decimals)."""
    return round(1.0 - fraction, 15)
