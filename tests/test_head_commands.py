"""Budgets of KV heads on the command line: calibrated, or imported from kvpress's curves, and built with any budget."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.engines import Run
from trt_kv.manifest import load_manifest
from trt_kv.recipe import Recipe
from trt_kv.runtime.engine import Engine

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    words = "the old storm marched toward a narrow tower . what does oscar hold ?".split()
    rng = np.random.default_rng(1)
    path.write_text("\n".join(" ".join(rng.choice(words, 20)) for _ in range(3)) + "\n")
    return path


def test_a_calibrated_recipe_builds_engines_of_any_budget(
    run: Run, small_checkpoint_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    of = ("--checkpoint", small_checkpoint_folder, "--policy", "lukv")
    code, out, _ = run(
        *("calibrate", *of, "--prompts", prompts, "--samples", "2", "--budget", "0.4"),
        *("--to-published", "theirs", "--out", "heads.json"),
    )
    assert code == 0
    recipe = Recipe.load(tmp_path / "heads.json")
    assert recipe.heads is not None
    assert np.mean(recipe.heads.at(0.4)) == pytest.approx(0.4, abs=0.01)
    assert (tmp_path / "heads.png").is_file()
    (curves,) = (tmp_path / "theirs").glob("*.npy")
    assert f"published form: theirs/{curves.name}" in out
    for budget, options in ((0.4, ()), (0.7, ("--budget", "0.7"))):
        build = ("build", *of, *options, "--set", "floor=0", "--recipe", "heads.json", "--out", f"engine-{budget}")
        assert run(*build)[0] == 0
        manifest = load_manifest(tmp_path / f"engine-{budget}")
        np.testing.assert_allclose(manifest.kept_shares, np.ravel(recipe.heads.at(budget)), atol=1e-6)
        assert manifest.policy.kept == budget
        assert "is up to date" in run(*build)[2]
    with Engine.load(tmp_path / "engine-0.4", cache_tokens=400, n_threads=1) as engine:
        held = engine.generate("the old storm marched toward a narrow tower .", max_new_tokens=3).kv_tokens
        assert len(held) == 6
    assert run("inspect", "engine-0.4")[0] == 0
    code, _, said = run("calibrate", *of, "--from-published", curves, "--budget", "0.4", "--out", "again.json")
    assert (code, said) == (0, "")
    again = Recipe.load(tmp_path / "again.json")
    assert again.heads is not None
    np.testing.assert_allclose(again.heads.rows, recipe.heads.rows, atol=2e-6)


def test_published_files_of_the_other_kind_are_refused(run: Run, small_checkpoint_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "layers_0.5.json").write_text(json.dumps([0.5, 0.4, 0.6]))
    np.save(tmp_path / "curves.npy", np.full((99, 3, 2), 0.5))
    for policy, file, expected in (("lukv", "layers_0.5.json", ".npy"), ("prefixkv", "curves.npy", ".json")):
        words = ("--checkpoint", small_checkpoint_folder, "--policy", policy, "--from-published", file, "--budget", "0.5")
        code, _, said = run("calibrate", *words, "--out", "recipe.json")
        assert code == 2
        assert expected in said


def test_a_calibrated_surrogate_builds_engines_of_any_budget(
    run: Run, small_checkpoint_folder: Path, prompts: Path, tmp_path: Path
) -> None:
    of = ("--checkpoint", small_checkpoint_folder, "--policy", "kvzap")
    assert run("calibrate", *of, "--prompts", prompts, "--samples", "2", "--out", "kvzap.json")[0] == 0
    recipe = Recipe.load(tmp_path / "kvzap.json")
    assert recipe.surrogate is not None
    assert recipe.mass is not None
    assert recipe.mass > recipe.budget, "what is predicted to matter is attended to more"
    build = ("build", *of, "--budget", "0.4", "--set", "floor=0", "recent=4", "--recipe", "kvzap.json", "--out", "engine")
    assert run(*build)[0] == 0
    thresholds = {one.threshold for one in load_manifest(tmp_path / "engine").predictors if one is not None}
    assert list(thresholds) == [pytest.approx(recipe.surrogate.threshold_at(0.4))]
    with Engine.load(tmp_path / "engine", cache_tokens=400, n_threads=1) as engine:
        assert len(engine.generate("the old storm marched toward a narrow tower .", max_new_tokens=3).kv_tokens) == 6
