"""KVzap: the fit is ridge regression, thresholds keep what they say, engines keep the tokens whose predictions exceed them."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.engines import CHUNK, kvzap_request, load_for_test, random_ids
from tests.test_heads_apart import dense_of
from trt_kv.calibration.kvzap import LinearFit, Tokens, calibrate_kvzap, predicted
from trt_kv.cli.inspection import describe_engine
from trt_kv.errors import EngineError, RecipeError, UsageError
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.manifest import load_manifest
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.paging import gather_kv, gather_slots, pages_of
from trt_kv.plugins.predicted_scores.features import features_of
from trt_kv.plugins.predicted_scores.spec import SPEC
from trt_kv.plugins.registry import kernel
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.policy_settings import policy_with
from trt_kv.program import PHASES, program_of_model
from trt_kv.recipe import Recipe, RecipeModel, RecipeScore
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.loading import check_policy_for_devices
from trt_kv.surrogate import Predictor, check_predictors

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = RecipeModel(name="made", digest="sha256:1", n_layers=3)
SCORE = RecipeScore(name="surrogate", heads="each")
N_FEATURES = 6


def tokens(seed: int, n_tokens: int = 40, n_layers: int = 2) -> Tokens:
    """Use is a function of the features, but for noise."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n_layers, 2, n_tokens, N_FEATURES)) * np.arange(1, N_FEATURES + 1) + 3.0
    features[..., 4] = 1.5
    noise = 0.1 * rng.normal(size=features.shape[:3])
    return Tokens(features=features.astype(np.float32), use=np.exp(features[..., 0] - 0.3 * features[..., 2] + noise - 5.0))


def calibrated(budget: float = 0.2, *, windowed_layers: Sequence[int] = (1,)) -> Recipe:
    prompts = [[seed] * 40 for seed in range(5)]
    told: list[tuple[int, int]] = []
    recipe = calibrate_kvzap(
        prompts,
        lambda ids, _: tokens(ids[0], n_layers=3 - len(windowed_layers)),
        budget=budget,
        score=SCORE,
        model=MODEL,
        source="numbers",
        windowed_layers=windowed_layers,
        on_sample=lambda done, total: told.append((done, total)),
    )
    assert told == [(n, 10) for n in range(1, 11)]
    return recipe


@given(st.integers(0, 1000), st.integers(1, 4))
def test_the_fit_is_ridge_regression_whatever_the_batches(seed: int, n_batches: int) -> None:
    """Compared with numpy's least squares on standardised features, with a row for each weight's penalty."""
    found = tokens(seed, 60)
    fit = LinearFit()
    for part in np.array_split(np.arange(60), n_batches):
        fit.add(found.features[:, :, part], np.log(found.use[:, :, part]))
    weights_LKF = fit.solved()
    for layer, head in np.ndindex(weights_LKF.shape[:2]):
        x, y = found.features[layer, head].astype(np.float64), np.log(found.use[layer, head])
        varies = np.std(x, axis=0) > 1e-9
        z = (x - x.mean(axis=0))[:, varies] / x.std(axis=0)[varies]
        penalty = np.sqrt(0.02 * len(x)) * np.eye(z.shape[1])
        standardised = np.linalg.lstsq(
            np.vstack([z, penalty]), np.concatenate([y - y.mean(), np.zeros(len(penalty))]), rcond=None
        )[0]
        expected = np.zeros(N_FEATURES)
        expected[varies] = standardised / x.std(axis=0)[varies]
        np.testing.assert_allclose(weights_LKF[layer, head, :-1], expected, atol=1e-7)
        assert weights_LKF[layer, head, -1] == pytest.approx(y.mean() - expected @ x.mean(axis=0))


def test_thresholds_are_exceeded_by_as_many_predictions_as_they_say() -> None:
    recipe = calibrated()
    surrogate = recipe.surrogate
    assert surrogate is not None
    weights = np.array([heads for heads in surrogate.weights if heads])
    scores = np.concatenate([predicted(weights, tokens(seed).features) for seed in range(5)], axis=2)
    for kept in (0.01, 0.1, 0.5, 0.99):
        assert (scores > surrogate.threshold_at(kept)).mean() == pytest.approx(kept, abs=0.003)
        shares = (scores > surrogate.threshold_at(kept)).mean(axis=(1, 2))
        assert surrogate.kept_at(kept) == pytest.approx((shares[0], 1.0, shares[1]), abs=0.01)
    between = surrogate.threshold_at(0.105)
    assert surrogate.threshold_at(0.11) < between < surrogate.threshold_at(0.1)
    assert recipe.kept == surrogate.kept_at(0.2)
    assert recipe.mass is not None
    assert recipe.mass > 0.5, "a fifth of the tokens, chosen well, has most of the use"


def test_a_recipe_survives_its_file_and_tells_other_budgets() -> None:
    recipe = calibrated()
    data = json.loads(recipe.to_text())
    assert data["version"] == 3
    assert "heads" not in data
    assert Recipe.from_json(data) == recipe
    other = recipe.with_budget(0.4)
    assert (other.budget, other.mass, other.calibration.samples) == (0.4, None, ())
    assert Recipe.from_json(json.loads(other.to_text())) == other


def test_features_with_the_weights_are_what_the_op_computes() -> None:
    """Calibration and runtime compute the same, heads with tokens of their own included."""
    for case in SPEC.cases:
        inputs = case_inputs(SPEC, case)
        kernel("PredictedScores", "cpu")(**inputs)
        weights = np.array(inputs["weights"]).reshape(case.dims["K"], -1)
        for b in np.flatnonzero(inputs["evict"] == 1):
            n_cached = int(inputs["kv_len"][inputs["layer"], b])
            pages = pages_of(inputs["page_table"], inputs["layer"], b, n_cached, inputs["page_size"])
            (k_KND, v_KND), positions_KN = (
                gather_kv(inputs["kv"], pages, n_cached),
                gather_slots(inputs["token_positions"], pages, n_cached),
            )
            for head, positions_N in enumerate(positions_KN):
                features = features_of(k_KND[[head]], v_KND[[head]], positions_N, inputs["frequencies"])
                expected = predicted(weights[None, [head]], features[None])[0, 0]
                got = gather_slots(inputs["scores"], pages, n_cached)[head]
                np.testing.assert_allclose(got, expected, atol=2e-5, rtol=2e-5)


def runner_with(folder: Path, policy: Policy, predictors: Sequence[Predictor], heads: int) -> Any:
    """The engine's layers with another policy, and a pool with ``heads`` KV heads to a page."""
    with load_for_test(folder) as engine:
        config = engine.manifest.config
        programs = {
            phase: program_of_model(config, policy, phase=phase, page_size=5, predictors=predictors) for phase in PHASES
        }
        pool = HostKvPool(n_pages=900, page_size=5, n_kv_heads=heads, head_size=config.head_dim)
        return host_runner(dense_of(engine), pool, programs, chunk=CHUNK, decode=policy.decode), random_ids(engine, 77, seed=3)


@pytest.mark.parametrize("heads", ["own", "each"])
def test_an_engine_keeps_what_exceeds_the_threshold(heads: str, small_kvzap_folder: Path) -> None:
    """Compared with the whole cache, of which predictions are made outside of the op. With heads "each", a layer keeps as many
    tokens as the head that needs most.
    """
    manifest = load_manifest(small_kvzap_folder)
    policy, config = dataclasses.replace(manifest.policy, heads=heads), manifest.config
    recipe = Recipe.load(small_kvzap_folder / "recipe.json")
    assert recipe.surrogate is not None
    found = [one for one in manifest.predictors if one is not None]
    frequencies = [found[layer * config.n_kv_heads].frequencies for layer in range(config.n_layers)]
    predictors = recipe.surrogate.predictors(
        config, policy.kept, frequencies, heads_apart=config.n_kv_heads if heads == "own" else 1
    )
    if heads == "own":
        assert [one.weights for one in predictors] == [pytest.approx(one.weights) for one in found]
    together = config.n_kv_heads if heads == "each" else 1
    runner, ids = runner_with(small_kvzap_folder, policy, predictors, together)
    whole, _ = runner_with(small_kvzap_folder, Policy(name="whole", summary=""), [], config.n_kv_heads)
    sequence, reference = runner.new_sequence(), whole.new_sequence()
    runner.prefill(sequence, ids)
    whole.prefill(reference, ids)
    weights = np.array(recipe.surrogate.weights)
    lengths = set()
    for layer in range(config.n_layers):
        pages = pages_of(reference.page_table[:, None], layer, 0, len(ids), 5)
        k_KND, v_KND = gather_kv(whole.pool.kv, pages, len(ids))
        features = features_of(k_KND, v_KND, np.arange(len(ids)), frequencies[layer])
        scores_KN = predicted(weights[[layer]], features[None])[0]
        inner = np.arange(policy.sinks, len(ids) - policy.recent)
        n_above_K = (scores_KN[:, inner] > np.float32(predictors[0].threshold)).sum(axis=1)
        n_above_K = n_above_K if heads == "own" else np.full_like(n_above_K, n_above_K.max())
        for head, n_above in enumerate(n_above_K):
            best = inner[np.argsort(-scores_KN[head, inner], kind="stable")[:n_above]]
            expected = sorted([*range(policy.sinks), *best, *range(len(ids) - policy.recent, len(ids))])
            held = runner.kept_positions(sequence, layer * config.n_kv_heads + head if heads == "own" else layer)
            assert held[0 if heads == "own" else head].tolist() == expected
            lengths.add(len(expected))
    assert len(lengths) >= 2, "budgets differ"


def test_what_is_kept_does_not_depend_on_what_follows(small_kvzap_folder: Path) -> None:
    """But for the newest tokens: the policy never sees a question."""
    with load_for_test(small_kvzap_folder) as engine:
        ids, n_common, recent = random_ids(engine, 70, seed=5), 60, engine.manifest.policy.recent
        held = []
        for tail in (ids[n_common:], ids[5:15]):
            sequence = engine.runner.new_sequence()
            engine.runner.prefill(sequence, [*ids[:n_common], *tail])
            before = n_common - recent
            held.append(
                [
                    [p for p in engine.runner.kept_positions(sequence, layer)[0].tolist() if p < before]
                    for layer in range(engine.manifest.cache_config.n_layers)
                ]
            )
            sequence.release()
        assert held[0] == held[1]


def test_an_engine_tells_its_policy(small_kvzap_folder: Path) -> None:
    told = describe_engine(small_kvzap_folder)
    assert "surrogate" in told
    assert "a threshold that 30% of the calibration's tokens exceeded" in told
    assert "computed for each input" in told


def test_another_recipe_beside_the_graphs_is_an_error(small_kvzap_folder: Path, small_checkpoint_folder: Path) -> None:
    """Weights are compared, one by one."""
    from trt_kv.runtime.compatibility import check_recipe

    manifest = load_manifest(small_kvzap_folder)
    check_recipe(small_kvzap_folder, manifest)
    layer = next(i for i, one in enumerate(manifest.predictors) if one is not None)
    nodes = list(manifest.programs["prefill"][layer])
    at = next(i for i, node in enumerate(nodes) if node.op == "PredictedScores")
    weights = (nodes[at].attributes["weights"][0] + 0.01, *nodes[at].attributes["weights"][1:])
    nodes[at] = dataclasses.replace(nodes[at], attributes={**nodes[at].attributes, "weights": weights})
    program = (*manifest.programs["prefill"][:layer], tuple(nodes), *manifest.programs["prefill"][layer + 1 :])
    changed = dataclasses.replace(manifest, programs={**manifest.programs, "prefill": program})
    with pytest.raises(EngineError, match="does not apply its recipe"):
        check_recipe(small_kvzap_folder, changed)


def test_weights_that_kernels_would_read_beyond_are_refused(small_kvzap_folder: Path) -> None:
    manifest = load_manifest(small_kvzap_folder)
    (one, *_) = [found for found in manifest.predictors if found is not None]
    for bad in (
        dataclasses.replace(one, weights=one.weights[:-1]),
        dataclasses.replace(one, frequencies=one.frequencies * 4),
        dataclasses.replace(one, threshold=float("nan")),
    ):
        with pytest.raises(EngineError, match="do not fit the model"):
            check_predictors([bad], manifest.config, heads_apart=manifest.heads_apart)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data["surrogate"].pop("thresholds"), "lacks fields"),
        (lambda data: data["surrogate"]["thresholds"].reverse(), "do not ascend"),
        (lambda data: data["surrogate"]["thresholds"].pop(), "not of all budgets"),
        (lambda data: data["surrogate"]["kept"][5].pop(), "one kept share per layer"),
        (lambda data: data["surrogate"]["weights"][0][0].pop(), "not a table"),
        (lambda data: data["surrogate"]["kept"][5].__setitem__(0, 1.5), "no shares"),
        (lambda data: data.update(surrogate=None), "lacks surrogate"),
        (lambda data: data.update(version=2), "version 2"),
        (lambda data: data.update(method="prefixkv"), "do not fit together"),
        (lambda data: data.update(kept=[0.5, 0.5, 0.5]), "those of its surrogate"),
    ],
)
def test_a_damaged_recipe_is_refused(change: Callable[[Any], None], words: str) -> None:
    data = json.loads(calibrated().to_text())
    change(data)
    with pytest.raises(RecipeError, match=words):
        Recipe.from_json(data)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": "uniform"}, "exactly with budget 'above'"),
        ({"score": "window"}, "exactly with budget 'above'"),
        ({"pooling": 3}, "predicted for each token"),
        ({"heads": "shared"}, "predicted for each token"),
        ({"decode": "rank"}, "predicted for each token"),
        ({"kept": 0.995}, "whole percentages"),
        ({"evict": "while_reading"}, "known before"),
    ],
)
def test_settings_that_do_not_go_with_predictions(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        policy_with(policy_from_name("kvzap"), settings)


def test_calibration_refuses_what_it_cannot_use() -> None:
    with pytest.raises(UsageError, match="no prompts"):
        calibrate_kvzap([], lambda ids, _: tokens(ids[0]), budget=0.1, score=SCORE, model=MODEL, source="")
    with pytest.raises(UsageError, match="out of range"):
        calibrated(0.0)
    with pytest.raises(UsageError, match="invalid values"):
        Tokens(features=np.zeros((1, 1, 2, 3)), use=-np.ones((1, 1, 2)))
    with pytest.raises(UsageError, match="do not fit together"):
        Tokens(features=np.zeros((1, 1, 2, 3)), use=np.ones((1, 1, 3)))


def test_gpus_are_refused(small_kvzap_folder: Path, small_checkpoint_folder: Path) -> None:
    """When built, and where an engine for CPUs is loaded on a device."""
    request = kvzap_request(open_checkpoint(small_checkpoint_folder), heads="each")
    with pytest.raises(UsageError, match="predicted scores are for"):
        dataclasses.replace(request, dtype="float16")
    manifest = load_manifest(small_kvzap_folder)
    with pytest.raises(UsageError, match="a budget for each KV head"):
        check_policy_for_devices(small_kvzap_folder, manifest)
    together = dataclasses.replace(manifest, policy=dataclasses.replace(manifest.policy, heads="each"))
    with pytest.raises(UsageError, match="predicts scores"):
        check_policy_for_devices(small_kvzap_folder, together)


def test_recipes_of_another_kind_do_not_build(small_checkpoint_folder: Path) -> None:
    request = kvzap_request(open_checkpoint(small_checkpoint_folder))
    with pytest.raises(RecipeError, match="not for policy 'lukv'"):
        dataclasses.replace(request, policy=dataclasses.replace(policy_from_name("lukv"), kept=request.policy.kept))
