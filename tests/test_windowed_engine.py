"""Engines of models with attention windows: built, calibrated, reported and loaded as what they are."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines import build_for_test, load_for_test, random_ids
from tests.windowed_models import dense_logits
from trt_kv.cli.generation_notes import held_note
from trt_kv.cli.inspection import describe_engine
from trt_kv.errors import EngineError, RecipeError, UsageError
from trt_kv.export.checkpoints.huggingface import HuggingFaceCheckpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.manifest import Manifest
from trt_kv.pipeline.calibration_runs import drift_from_prompts, recipe_from_prompts
from trt_kv.pipeline.plans import CalibrationPlan, DriftPlan
from trt_kv.policies import policy_without_floor
from trt_kv.policy import Policy
from trt_kv.program import OpNode
from trt_kv.runtime.compatibility import check_compatible

pytestmark = pytest.mark.slow

WINDOWS = (0, 9, 0)
CAP, SCALE = 1.5, 0.4


def checkpoint_of(folder: Path, **fields: Any) -> HuggingFaceCheckpoint:
    """The small checkpoint with other fields of its config."""
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, HuggingFaceCheckpoint)
    return dataclasses.replace(checkpoint, config=dataclasses.replace(checkpoint.config, **fields))


def small_policy(name: str, **fields: Any) -> Policy:
    return dataclasses.replace(policy_without_floor(name), **fields)


def calibrated(checkpoint: HuggingFaceCheckpoint, policy: Policy, tmp_path: Path) -> EngineRequest:
    """What the pipeline does between opening a checkpoint and building the engine."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"number {i} and then {'more words ' * (20 + i)}" for i in range(3)))
    plan = CalibrationPlan(prompts=prompts, samples=3)
    quiet: dict[str, Any] = {"on_progress": lambda *_: None, "on_note": lambda _: None}
    applied = policy.applied_to(checkpoint.config.windows)
    recipe = recipe_from_prompts(checkpoint, policy, plan, **quiet) if applied.needs_recipe else None
    drift = None
    if applied.needs_drift:
        drift = drift_from_prompts(checkpoint, policy, plan, DriftPlan(tokens=8, page_size=4), recipe, **quiet)
    return EngineRequest(checkpoint=checkpoint, policy=policy, recipe=recipe, drift=drift, page_size=4)


def test_a_windowed_engine_computes_masked_attention(small_checkpoint_folder: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(small_checkpoint_folder, windows=WINDOWS, attention_soft_cap=CAP, attention_scale=SCALE)
    request = EngineRequest(checkpoint=checkpoint, policy=small_policy("full"), page_size=4)
    engine = load_for_test(build_for_test(request, tmp_path / "engine"))
    ids = random_ids(engine, 90, seed=1)
    sequence = engine.runner.new_sequence()
    got = [engine.runner.prefill(sequence, ids[:70])]
    got += [engine.runner.decode([sequence], [token])[0] for token in ids[70:]]
    decoder = decoder_from_checkpoint(checkpoint)
    np.testing.assert_allclose(np.stack(got), dense_logits(checkpoint.config, ids, decoder=decoder)[69:], rtol=1e-3, atol=1e-3)
    assert sequence.held_tokens.tolist() == [90, 10, 90]
    sequence.release()
    text = describe_engine(tmp_path / "engine")
    assert "a window of 9 tokens in layers 1" in text
    assert "logits of attention capped at 1.5" in text
    assert f"{9 / checkpoint.config.max_positions:.1%}  window" in text
    generation = engine.generate(ids[:40], max_new_tokens=30, temperature=0.0)
    n = generation.num_computed_tokens
    assert generation.kv_tokens[0] == generation.kv_tokens[2] == n
    assert 8 <= generation.kv_tokens[1] <= 8 + 3
    assert f"of {n} tokens per layer" in held_note(engine.manifest, generation)


def test_a_recipe_leaves_windowed_layers_out(small_checkpoint_folder: Path, tmp_path: Path) -> None:
    """The budget is the mean over the others, and the engine is the recipe's."""
    checkpoint = checkpoint_of(small_checkpoint_folder, windows=WINDOWS)
    request = calibrated(checkpoint, small_policy("prefixkv", kept=0.5), tmp_path)
    recipe = request.recipe
    assert recipe is not None
    assert recipe.curves is not None
    assert recipe.kept[1] == 1.0
    assert (recipe.kept[0] + recipe.kept[2]) / 2 == pytest.approx(0.5, abs=0.01)
    assert [len(curve) > 0 for curve in recipe.curves.layers] == [True, False, True]
    engine = load_for_test(build_for_test(request, tmp_path / "engine"))
    generation = engine.generate(random_ids(engine, 60, seed=2), max_new_tokens=10, temperature=0.0)
    assert "without exempt layers" in held_note(engine.manifest, generation)
    assert "mean over layers without a window" in describe_engine(tmp_path / "engine")
    assert engine.manifest.policy == request.policy


def test_thresholds_leave_windowed_layers_out(small_checkpoint_folder: Path, tmp_path: Path) -> None:
    policy = small_policy("freekv", tokens=24, sinks=4, recent=4, drift="calibrated")
    checkpoint = checkpoint_of(small_checkpoint_folder, windows=WINDOWS)
    request = calibrated(checkpoint, policy, tmp_path)
    assert request.drift is not None
    assert [layer.layer for layer in request.drift.layers] == [0, 2]
    engine = load_for_test(build_for_test(request, tmp_path / "engine"))
    generation = engine.generate(random_ids(engine, 60, seed=2), max_new_tokens=10, temperature=0.0)
    assert "a step attends to at most" in held_note(engine.manifest, generation)
    assert engine.manifest.taus[1] is None
    assert "a window of 9 tokens" in describe_engine(tmp_path / "engine")


@pytest.mark.parametrize("name", ["prefixkv", "freekv"])
def test_a_model_of_windows_alone_needs_no_calibration(name: str, small_checkpoint_folder: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(small_checkpoint_folder, windows=(9, 5, 30))
    policy = small_policy(name)
    quiet: dict[str, Any] = {"on_progress": lambda *_: None, "on_note": lambda _: None}
    with pytest.raises(UsageError, match="decides nothing"):
        recipe_from_prompts(checkpoint, policy, CalibrationPlan(), **quiet)
    engine = load_for_test(build_for_test(calibrated(checkpoint, policy, tmp_path), tmp_path / "engine"))
    assert engine.manifest.policy == policy
    generation = engine.generate(random_ids(engine, 60, seed=2), max_new_tokens=10, temperature=0.0)
    assert all(n < 40 for n in generation.kv_tokens)
    assert "decides nothing here" in describe_engine(tmp_path / "engine")


def without(manifest: Manifest, *names: str) -> Manifest:
    """The manifest of an engine whose nodes lack attributes."""
    programs = {
        phase: tuple(
            tuple(
                OpNode(op=node.op, attributes={name: v for name, v in node.attributes.items() if name not in names})
                for node in nodes
            )
            for nodes in program
        )
        for phase, program in manifest.programs.items()
    }
    return dataclasses.replace(manifest, programs=programs)


def test_engines_without_the_attributes_load_if_the_model_has_none(small_folder: Path) -> None:
    manifest = load_for_test(small_folder).manifest
    old = without(manifest, "window", "soft_cap")
    check_compatible(small_folder, old)
    assert old.windows == [0, 0, 0]
    for fields in ({"windows": WINDOWS}, {"attention_soft_cap": CAP}):
        of_other = dataclasses.replace(old, config=dataclasses.replace(old.config, **fields))
        with pytest.raises(EngineError, match="does not apply the policy"):
            check_compatible(small_folder, of_other)


def test_a_recipe_of_a_model_without_windows_is_not_needed_twice(small_checkpoint_folder: Path) -> None:
    checkpoint = checkpoint_of(small_checkpoint_folder, windows=WINDOWS)
    with pytest.raises(RecipeError, match="needs a recipe"):
        EngineRequest(checkpoint=checkpoint, policy=small_policy("prefixkv"))
