"""What drift thresholds promise: a tau per layer that corrects the wanted share of KV heads, in a file that is checked."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_kv.calibration.drift import LayerTrace, calibrate_drift, rate_at, threshold_at
from trt_kv.calibration.drift_plot import picture_from_drift
from trt_kv.drift import ALWAYS, NEVER, Drift, drift_settings
from trt_kv.errors import RecipeError, UsageError
from trt_kv.policies import policy_from_name
from trt_kv.recipe import RecipeModel

FREEKV = policy_from_name("freekv")
cosines = st.lists(st.floats(min_value=-1.0, max_value=1.0), min_size=1, max_size=60).map(np.array)
rates = st.floats(min_value=0.0, max_value=1.0)


def drift_of(n_layers: int = 3, *, exempt: tuple[int, ...] = (1,), rate: float = 0.2, n_heads: int = 5) -> Drift:
    """Thresholds from random cosines of two prompts, 7 and 11 steps long; the deeper the layer, the more alike."""
    rng = np.random.default_rng(n_layers)
    n_steps = iter((7, 11))

    def trace_of(_token_ids: object) -> dict[int, LayerTrace]:
        size = (next(n_steps), n_heads)
        overlap = rng.uniform(size=size)
        overlap[0] = np.nan
        layers = [layer for layer in range(n_layers) if layer not in exempt]
        return {layer: LayerTrace(cosine=rng.uniform(layer / n_layers, 1.0, size), overlap=overlap) for layer in layers}

    return calibrate_drift(
        [range(50), range(60)],
        trace_of,
        correction_rate=rate,
        model=RecipeModel(name="some-model", digest="sha256:1", n_layers=n_layers),
        settings=drift_settings(dataclasses.replace(FREEKV, exempt_layers=exempt), 32),
        source="a test",
        max_new_tokens=11,
    )


@given(cosines, rates)
def test_a_threshold_corrects_the_wanted_share_and_no_larger_one_does(cosine_N: np.ndarray, rate: float) -> None:
    tau = threshold_at(cosine_N, rate)
    n_wanted = math.floor(rate * len(cosine_N) + 1e-9)
    assert rate_at(cosine_N, tau) * len(cosine_N) <= n_wanted + 1e-6
    if tau < ALWAYS:
        larger = np.nextafter(np.float32(tau), np.float32(2))
        assert rate_at(cosine_N, float(larger)) * len(cosine_N) > n_wanted - 1e-6 + 1
    if len(np.unique(cosine_N.astype(np.float32))) == len(cosine_N):
        assert rate_at(cosine_N, tau) * len(cosine_N) == pytest.approx(n_wanted)


@given(cosines, rates, rates)
def test_a_higher_rate_never_gives_a_lower_threshold(cosine_N: np.ndarray, one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert NEVER <= threshold_at(cosine_N, low) <= threshold_at(cosine_N, high) <= ALWAYS


@given(cosines, rates)
def test_a_threshold_is_the_same_number_in_the_file_and_on_the_node(cosine_N: np.ndarray, rate: float) -> None:
    tau = json.loads(json.dumps(threshold_at(cosine_N, rate)))
    assert float(str(np.float32(tau))) == tau


def test_what_has_no_direction_is_always_corrected() -> None:
    cosine_N = np.array([math.nan, 0.9, 0.8, 0.7])
    assert threshold_at(cosine_N, 0.25) == pytest.approx(0.7)
    assert rate_at(cosine_N, threshold_at(cosine_N, 0.25)) == 0.25
    assert (threshold_at(cosine_N, 0.0), threshold_at(cosine_N, 1.0)) == (NEVER, ALWAYS)
    assert rate_at(cosine_N, NEVER) == 0.25


@pytest.mark.parametrize(("cosine", "rate"), [([], 0.5), ([0.5], -0.1), ([0.5], 1.1), ([0.5], math.nan)])
def test_a_threshold_of_nothing_or_at_no_rate_is_refused(cosine: list[float], rate: float) -> None:
    with pytest.raises(UsageError, match="invalid rate or no cosines"):
        threshold_at(np.array(cosine), rate)


def test_each_recalled_layer_has_its_own_threshold_and_what_it_corrects() -> None:
    drift = drift_of()
    assert drift.taus[1] is None
    first, last = drift.layers
    assert (first.layer, last.layer) == (0, 2)
    assert first.tau < last.tau
    for layer in drift.layers:
        assert layer.rate == pytest.approx(18 / 90)
        assert layer.rate == pytest.approx(sum(head.rate for head in layer.heads) / 5, abs=1e-5)
        assert layer.rate < layer.step_rate <= 1.0
        assert all(low <= any_one for low, any_one in zip(layer.lowest, layer.cosine, strict=True))
        assert layer.cosine[0] == min(head.cosine[0] for head in layer.heads)
    assert [sample.n_steps for sample in drift.calibration.samples] == [7, 11]
    assert drift == drift_of()


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.5, math.nan, math.inf])
def test_rates_at_which_nothing_is_chosen_are_refused(rate: float) -> None:
    with pytest.raises(UsageError, match="correction rate"):
        drift_of(rate=rate)


def test_prompts_after_which_nothing_came_are_refused() -> None:
    model = RecipeModel(name="some-model", digest="sha256:1", n_layers=1)
    for prompts, words in (([], "no prompts"), ([[1]], "nothing was generated")):
        with pytest.raises(UsageError, match=words):
            calibrate_drift(
                prompts,
                lambda _: {},
                correction_rate=0.1,
                model=model,
                settings=drift_settings(FREEKV, 32),
                source="a test",
                max_new_tokens=4,
            )


def test_a_saved_file_loads_as_it_was(tmp_path: Path) -> None:
    drift = drift_of()
    drift.save(tmp_path / "drift.json")
    assert Drift.load(tmp_path / "drift.json") == drift
    lines = (tmp_path / "drift.json").read_text().splitlines()
    assert lines[1:4] == ['  "format": "trt-kv-drift",', '  "version": 1,', '  "correction_rate": 0.2,']
    assert sum('"overlap"' in line for line in lines) == 2 * 5


@given(st.floats(min_value=NEVER, max_value=ALWAYS), rates, rates.filter(lambda rate: 0 < rate < 1))
def test_any_numbers_survive_the_file(tau: float, share: float, rate: float) -> None:
    drift = drift_of()
    layer = dataclasses.replace(drift.layers[0], tau=tau, rate=share, step_rate=share)
    changed = dataclasses.replace(drift, correction_rate=rate, layers=(layer, drift.layers[1]))
    assert Drift.from_json(json.loads(json.dumps(changed.to_json()))) == changed


def _set(*path: str | int, to: Any) -> Callable[[Any], None]:
    def change(data: Any) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("format", to="trt-kv-recipe"), "not a file of trt-kv drift"),
        (_set("version", to=2), "version"),
        (_set("version", to=True), "version"),
        (_set("tau", to=0.8), "unknown fields"),
        (_set("correction_rate", to=0.0), "correction rate"),
        (_set("correction_rate", to=math.nan), "not a number"),
        (_set("model", "n_layers", to=4), "do not match the recalled layers"),
        (_set("settings", "exempt_layers", to=[]), "do not match the recalled layers"),
        (_set("settings", "page_size", to=32.5), "wrong type"),
        (_set("layers", to=[]), "do not match the recalled layers"),
        (_set("layers", 0, "layer", to=2), "do not match the recalled layers"),
        (_set("layers", 0, "tau", to=1.5), "tau is out of range"),
        (_set("layers", 0, "tau", to=None), r"layers\[0\].tau is not a number"),
        (_set("layers", 0, "rate", to=1.5), "not a share"),
        (_set("layers", 0, "heads", to=[]), "not measured"),
        (_set("layers", 0, "heads", 0, "overlap", to=-0.5), "not a share"),
        (_set("layers", 0, "cosine", to=[0.1, 0.2]), "invalid quantiles"),
        (_set("layers", 0, "lowest", 0, to=0.99), "invalid quantiles"),
        (_set("shares", 0, to=0.1), "do not rise from 0 to 1"),
        (_set("calibration", "samples", 0, "n_tokens", to=0), "no tokens"),
    ],
)
def test_whatever_is_wrong_in_a_file_is_named(change: Callable[[Any], None], words: str, tmp_path: Path) -> None:
    data = json.loads(json.dumps(drift_of().to_json()))
    change(data)
    path = tmp_path / "drift.json"
    path.write_text(json.dumps(data))
    with pytest.raises(RecipeError, match=words) as caught:
        Drift.load(path)
    assert str(path) in caught.value.what


def test_thresholds_belong_to_one_model() -> None:
    drift = drift_of()
    drift.check_model(digest="sha256:1", n_layers=3)
    with pytest.raises(RecipeError, match="digest is not this checkpoint's"):
        drift.check_model(digest="sha256:2", n_layers=3)
    with pytest.raises(RecipeError, match="number of layers"):
        drift.check_model(digest="sha256:1", n_layers=4)


@pytest.mark.parametrize(("n_layers", "n_heads", "has_choice"), [(1, 1, False), (20, 4, True)])
def test_a_picture_is_drawn_for_any_number_of_layers(n_layers: int, n_heads: int, has_choice: bool, tmp_path: Path) -> None:
    drift = drift_of(n_layers, exempt=(), n_heads=n_heads)
    if not has_choice:
        (layer,) = drift.layers
        heads = tuple(dataclasses.replace(head, overlap=None) for head in layer.heads)
        drift = dataclasses.replace(drift, layers=(dataclasses.replace(layer, heads=heads),))
        assert drift.layers[0].overlap is None
    picture_from_drift(drift, tmp_path / "drift.png")
    image = matplotlib.image.imread(tmp_path / "drift.png")
    assert image.shape[:2] == (1200, 1650)
    assert len(np.unique(image.reshape(-1, image.shape[2]), axis=0)) > 20
    assert [path.name for path in tmp_path.iterdir()] == ["drift.png"]
