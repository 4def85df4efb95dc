"""Checkpoint + policy -> engine folder, after calibrating what the policy needs and the request does not provide."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trt_kv.drift import Drift
from trt_kv.manifest import FILE_NAME as MANIFEST_FILE
from trt_kv.pipeline.calibration_runs import drift_from_prompts, recipe_from_prompts
from trt_kv.pipeline.callbacks import OnNote, OnProgress, ignore
from trt_kv.pipeline.destinations import check_new_file, check_new_folder
from trt_kv.pipeline.given_files import drift_of_plan, policy_of_recipe, recipe_for_policy
from trt_kv.pipeline.handover import hand_over
from trt_kv.pipeline.plans import TENSORRT_LLM, TargetPlan
from trt_kv.pipeline.reproduce import command_line_of, is_built
from trt_kv.pipeline.requests import BuildRequest
from trt_kv.pipeline.sources import open_source
from trt_kv.pipeline.tokenizer_notes import tokenizer_notes
from trt_kv.presets import preset
from trt_kv.profiles import DEFAULT as DEFAULT_PROFILE
from trt_kv.profiles import build_profile
from trt_kv.recipe import Recipe
from trt_kv.require import require_tensorrt

if TYPE_CHECKING:
    from trt_kv.export.targets.tensorrt_profile import TensorRtOptions


def build_engine(request: BuildRequest, *, on_progress: OnProgress = ignore, on_note: OnNote = ignore) -> Path:
    """Build the engine at ``request.out`` and return that path; the folder appears whole or not at all.

    A recipe or drift thresholds that the policy needs and the request does not provide are calibrated first; a plot of each is
    added to the engine. An existing engine at ``out`` that was built by the same request from the same weights is kept. Raises
    ``UsageError`` if something else is there, ``CheckpointError``, ``RecipeError`` and ``EngineError`` for what cannot be
    read, does not fit together or cannot be written.

    Example::

        from pathlib import Path

        from trt_kv.pipeline import BuildRequest, ModelSource, build_engine
        from trt_kv.policies import policy_from_name

        source, policy = ModelSource(model="llama3"), policy_from_name("prefixkv")
        build_engine(BuildRequest(source=source, policy=policy, out=Path("engines/first")), on_note=print)
    """
    if request.target.target == TENSORRT_LLM:
        return hand_over(request, on_progress=on_progress, on_note=on_note)
    from trt_kv.export import engine
    from trt_kv.export.new_folder import check_destination
    from trt_kv.runtime.processes import will_compute

    will_compute()
    options = _tensorrt_options(request.target)
    request = dataclasses.replace(request, drift=dataclasses.replace(request.drift, page_size=request.target.page_size))
    out, target = request.out, request.target
    if not (out / MANIFEST_FILE).is_file():
        check_destination(out, replace=request.replace)
    check_new_folder(out.parent, "--out")
    checkpoint = open_source(request.source, on_note)
    checkpoint.config.check_page_size(target.page_size)
    if not request.replace and is_built(out, request, checkpoint):
        on_note(f"{out} is up to date")
        return out
    check_destination(out, replace=request.replace)
    for note in tokenizer_notes(checkpoint):
        on_note(note)
    recipe = recipe_for_policy(request.recipe, request.policy) if request.recipe is not None else None
    policy = request.policy if recipe is None else policy_of_recipe(request.policy, recipe, on_note)
    applied = policy.applied_to(checkpoint.config.windows)
    if policy != applied and not (applied.evicts or applied.recalls):
        on_note(f"note: every layer of {checkpoint.name} keeps its attention window, so policy {policy.name!r} decides nothing")
    drift = drift_of_plan(applied, request.drift, on_note)
    if applied.needs_recipe and recipe is None:
        recipe = recipe_from_prompts(checkpoint, policy, request.calibration, on_progress=on_progress, on_note=on_note)
    if applied.needs_drift and drift is None:
        drift = drift_from_prompts(
            checkpoint, policy, request.calibration, request.drift, recipe, on_progress=on_progress, on_note=on_note
        )
    engine_request = engine.EngineRequest(
        checkpoint=checkpoint,
        policy=policy,
        recipe=recipe,
        drift=drift,
        dtype=target.dtype or "float32",
        quantization=request.weights.quantization,
        kv_dtype=target.kv_dtype,
        page_size=target.page_size,
        tensorrt=options,
        model_source=request.source.checkpoint or preset(request.source.model).origin,
        reproduce=command_line_of(request),
    )
    with _pictures(recipe, drift) as pictures:
        engine.build_engine(engine_request, out, replace=request.replace, on_progress=on_progress, extra_files=pictures)
    return out


@contextlib.contextmanager
def _pictures(recipe: Recipe | None, drift: Drift | None) -> Iterator[list[Path]]:
    """Temporary files with a plot of each, removed at the end of the block."""
    from trt_kv.calibration.drift_plot import picture_from_drift
    from trt_kv.calibration.recipe_plot import picture_from_recipe

    with tempfile.TemporaryDirectory() as scratch:
        pictures = []
        if recipe is not None:
            pictures.append(Path(scratch) / "recipe.png")
            picture_from_recipe(recipe, pictures[-1])
        if drift is not None:
            pictures.append(Path(scratch) / "drift.png")
            picture_from_drift(drift, pictures[-1])
        yield pictures


def _tensorrt_options(target: TargetPlan) -> "TensorRtOptions | None":
    """How to compile for TensorRT; raises if TensorRT is not installed or the profile is invalid, before anything is read."""
    from trt_kv.export.targets.tensorrt_profile import TensorRtOptions

    if target.target != "tensorrt":
        return None
    profile = build_profile(target.profile or DEFAULT_PROFILE)
    require_tensorrt()
    if target.timing_cache is not None:
        check_new_file(target.timing_cache, "--timing-cache", in_place=True)
    return TensorRtOptions(profile=profile, timing_cache=target.timing_cache)
