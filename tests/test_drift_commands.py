"""Drift thresholds as a user makes them, builds with them and looks at them."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.engines import Run
from trt_kv.drift import Drift
from trt_kv.errors import EngineError, RecipeError
from trt_kv.export import engine as engine_module
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.manifest import load_manifest
from trt_kv.policies import policy_from_name
from trt_kv.recipe import Recipe
from trt_kv.runtime.compatibility import check_compatible, check_recipe

SETTINGS = ("--set", "tokens=128", "sinks=2", "recent=3")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration prompts, longer than what a step attends to."""
    words = "the old storm marched toward a narrow tower . question : what does oscar hold ?".split()
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(" ".join(rng.choice(words, 100)) for _ in range(2)) + "\n")
    return path


@pytest.fixture
def measured(run: Run, small_checkpoint_folder: Path, prompts: Path, tmp_path: Path) -> Path:
    """Thresholds of the small checkpoint at a rate of 25 %."""
    words = ("calibrate", "--checkpoint", small_checkpoint_folder, "--policy", "freekv", *SETTINGS, "--prompts", prompts)
    code, out, err = run(*words, "--correction-rate", "0.25", "--new-tokens", "12", "--out", "measured/mine.json")
    assert (code, err) == (0, "")
    source = f"--model llama3 --checkpoint {small_checkpoint_folder} --policy freekv"
    assert out.splitlines()[-2:] == [
        "drift:  measured/mine.json",
        f"next:   trt-kv build {source} {' '.join(SETTINGS)} drift=calibrated --drift measured/mine.json",
    ]
    return tmp_path / "measured" / "mine.json"


def test_thresholds_made_apart_are_in_the_engine(run: Run, measured: Path, small_checkpoint_folder: Path) -> None:
    """calibrate, build --drift, inspect; an engine whose file says something else than its graphs is refused."""
    drift = Drift.load(measured)
    assert measured.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert (drift.correction_rate, drift.n_steps, len(set(drift.taus))) == (0.25, 24, 3)
    assert drift.settings.tokens == 128
    assert all(layer.overlap is not None for layer in drift.layers)

    source = ("--checkpoint", small_checkpoint_folder, "--policy", "freekv", *SETTINGS, "drift=calibrated")
    code, _, err = run("build", *source, "--drift", measured, "--out", "engine")
    assert (code, err) == (0, "")
    folder = Path("engine")
    manifest = load_manifest(folder)
    assert manifest.taus == pytest.approx(drift.taus)
    assert {"drift.json", "drift.png"} <= set(manifest.files)
    assert Drift.load(folder / "drift.json") == drift
    check_compatible(folder, manifest)
    check_recipe(folder, manifest)

    code, out, err = run("inspect", "engine")
    assert (code, err) == (0, "")
    assert "drift threshold per layer (from drift.json, for a correction rate of 0.25)" in out
    for layer in drift.layers:
        assert f"  {layer.layer:>3} {layer.tau:.6f}" in out
    assert "drift     24 steps after 2 samples: prompts.txt, sha256:" in out
    assert f"drift=calibrated --drift {measured}" in out

    other = dataclasses.replace(drift, layers=(dataclasses.replace(drift.layers[0], tau=0.123), *drift.layers[1:]))
    other.save(folder / "drift.json")
    with pytest.raises(EngineError, match="does not apply its drift thresholds"):
        check_recipe(folder, manifest)

    code, _, err = run("build", *source, "--drift", measured, "--correction-rate", "0.1", "--out", "other")
    assert code == 2
    assert "made for another correction rate" in err
    code, _, err = run("build", *source, "exempt_layers=0", "--drift", measured, "--out", "other")
    assert code == 1
    assert "thresholds for all layers except [0]" in err
    assert not Path("other").exists()


def test_a_recipe_and_thresholds_in_one_build(run: Run, small_checkpoint_folder: Path, prompts: Path) -> None:
    """PrefixKV's recipe for the working set, and thresholds measured under it."""
    words = ("--checkpoint", small_checkpoint_folder, "--policy", "freekv", "--budget", "0.7")
    settings = ("--set", "budget=recipe", "drift=calibrated", "sinks=2", "recent=3")
    calibration = ("--prompts", prompts, "--samples", "2", "--new-tokens", "12")
    code, _, err = run("build", *words, *settings, *calibration, "--out", "engine")
    assert (code, err) == (0, "")
    folder = Path("engine")
    manifest = load_manifest(folder)
    recipe, drift = Recipe.load(folder / "recipe.json"), Drift.load(folder / "drift.json")
    assert recipe.score.name == "mass"
    assert manifest.kept_shares == pytest.approx(recipe.kept)
    assert manifest.taus == pytest.approx(drift.taus)
    assert (drift.correction_rate, drift.settings.budget, drift.settings.kept) == (0.1, "recipe", 0.7)
    assert {"recipe.png", "drift.png"} <= set(manifest.files)
    check_compatible(folder, manifest)
    check_recipe(folder, manifest)
    assert "--correction-rate 0.1 --new-tokens 12 --samples 2 --seed 0" in manifest.reproduce

    shutil.copyfile(folder / "recipe.json", "recipe.json")
    code, out, _ = run("calibrate", *words, *settings, *calibration, "--recipe", "recipe.json", "--out", "apart.json")
    assert code == 0
    assert "--recipe recipe.json --drift apart.json" in out
    assert Drift.load(Path("apart.json")) == drift


def test_other_settings_than_those_measured_are_told(
    run: Run, measured: Path, small_checkpoint_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "build_engine", lambda *_, **__: None)
    words = ("build", "--checkpoint", small_checkpoint_folder, "--policy", "freekv", "--set", "drift=calibrated")
    code, _, err = run(*words, "tokens=512", "sinks=2", "recent=3", "--drift", measured)
    assert code == 0
    assert err == "the thresholds were measured with tokens 128: correction rates may differ here\n"


def test_an_engine_request_has_thresholds_exactly_where_its_policy_reads_them(
    measured: Path, small_checkpoint_folder: Path
) -> None:
    checkpoint = open_checkpoint(small_checkpoint_folder)
    freekv = policy_from_name("freekv")
    with pytest.raises(RecipeError, match="needs drift thresholds"):
        EngineRequest(checkpoint=checkpoint, policy=dataclasses.replace(freekv, drift="calibrated"))
    with pytest.raises(RecipeError, match="reads no drift thresholds"):
        EngineRequest(checkpoint=checkpoint, policy=freekv, drift=Drift.load(measured))
    data = json.loads(measured.read_text())
    data["model"]["digest"] = "sha256:0"
    with pytest.raises(RecipeError, match="for another model"):
        EngineRequest(
            checkpoint=checkpoint, policy=dataclasses.replace(freekv, drift="calibrated"), drift=Drift.from_json(data)
        )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("build --policy freekv --correction-rate 0.1", "add --set drift=calibrated"),
        ("build --policy freekv --drift FILE", "add --set drift=calibrated"),
        ("build --new-tokens 5", "recalls no pages"),
        ("export --out graphs --drift FILE", "recalls no pages"),
        ("build --policy freekv --set drift=calibrated --correction-rate 0", "share of KV heads"),
        ("build --policy freekv --set drift=calibrated --correction-rate 1", "share of KV heads"),
        ("build --policy freekv --set drift=calibrated --correction-rate nan", "share of KV heads"),
        ("build --policy freekv --set drift=calibrated --new-tokens 0", "--new-tokens >= 1"),
        ("build --policy freekv --set drift=calibrated --new-tokens 9 --drift FILE", "one of the two"),
        ("build --policy freekv --set drift=calibrated tau=0.9", "would be ignored"),
        ("calibrate --correction-rate 0.1", "recalls no pages"),
        ("calibrate --recipe FILE", "this command produces a recipe"),
        ("calibrate --policy freekv --recipe FILE", "reads no recipe"),
        ("calibrate --policy freekv --to-published lists", "no published form"),
        ("calibrate --policy freekv --set tau=0.7", "tau is the result of this calibration"),
        ("calibrate --policy freekv --out drift.png", "would overwrite"),
        ("calibrate --policy freekv --set budget=recipe --correction-rate 0.2", "add --set drift=calibrated"),
    ],
)
def test_an_impossible_request_exits_with_2_and_says_why(words: str, said: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_text("{}")
    code, out, err = run(*words.replace("FILE", "file.json").split())
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["file.json"]
