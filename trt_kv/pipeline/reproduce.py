"""The command that builds an engine again, and whether it would change anything."""

import dataclasses
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from trt_kv.digests import digest_of
from trt_kv.drift import Drift
from trt_kv.engine_files import verify_files
from trt_kv.errors import EngineError, RecipeError
from trt_kv.manifest import DRIFT_FILE, RECIPE_FILE, Manifest, load_manifest
from trt_kv.pipeline.calibration_prompts import calibration_source
from trt_kv.pipeline.given_files import budget_is_chosen, recipe_for_policy
from trt_kv.pipeline.plans import DEFAULT_PAGE_SIZE
from trt_kv.pipeline.requests import BuildRequest
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.policy_settings import SHARED_BUDGETS, differences, setting_as_text
from trt_kv.recipe import CREATED_BY, Recipe

if TYPE_CHECKING:
    from trt_kv.export.checkpoints.base import Checkpoint


def command_line_of(request: BuildRequest) -> str:
    """The command that builds the same engine again."""
    return shlex.join(["trt-kv", *build_words(request)])


def build_words(request: BuildRequest) -> list[str]:
    """The words of that command after the program's name."""
    source, policy, recipe = request.source, request.policy, request.recipe
    drift, plan, target = request.drift, request.calibration, request.target
    words: list[str | Path | int | float] = ["build", "--model", source.model]
    words += ["--checkpoint", source.checkpoint] if source.checkpoint else []
    words += ["--context", source.context] if source.context is not None else []
    words += ["--policy", policy.name]
    told = recipe is None or budget_is_chosen(policy)
    words += ["--budget", policy.kept] if policy.budget in SHARED_BUDGETS and told else []
    words += ["--score", policy.score] if policy.evicts else []
    words += ["--window", policy.window] if "window" in policy.scoring.settings else []
    changed = differences(policy, policy_from_name(policy.name)) if policy.name in policy_names() else {}
    settings = [setting_as_text(name, value) for name, value in changed.items() if name not in ("kept", "score", "window")]
    words += ["--set", *settings] if settings else []
    words += ["--recipe", recipe] if recipe is not None else []
    if policy.needs_drift and drift.file is not None:
        words += ["--drift", drift.file]
    elif policy.needs_drift:
        words += ["--correction-rate", drift.correction_rate, "--new-tokens", drift.new_tokens]
    if request.calibrates:
        words += ["--samples", plan.samples, "--seed", plan.seed]
        words += ["--prompts", plan.prompts] if plan.prompts else []
    words += ["--target", target.target] if target.target != "onnxruntime" else []
    words += ["--profile", target.profile] if target.profile else []
    words += ["--dtype", target.dtype] if target.dtype else []
    words += ["--kv-dtype", target.kv_dtype] if target.kv_dtype else []
    words += ["--page-size", target.page_size] if target.page_size != DEFAULT_PAGE_SIZE else []
    words += ["--quant", request.weights.quant, *request.weights.details] if request.weights.quantization is not None else []
    return [str(word) for word in words]


def is_built(folder: Path, request: BuildRequest, checkpoint: "Checkpoint") -> bool:
    """Whether ``folder`` holds a complete engine made by this version, by this request, from these weights and files."""
    try:
        manifest = load_manifest(folder)
        verify_files(folder, manifest)
    except EngineError:
        return False
    made = (manifest.reproduce, manifest.created_by, manifest.model_digest)
    copied = {name: digest_of(path) for name, path in checkpoint.tokenizer_files.items()}
    recorded = {name: manifest.files[name].digest for name in copied if name in manifest.files}
    wanted = (command_line_of(request), CREATED_BY, checkpoint.digest)
    # The kept share is among the words of the command, or that of the recipe.
    built = manifest.policy
    same_policy = built == dataclasses.replace(request.policy, summary=built.summary, kept=built.kept)
    return made == wanted and same_policy and recorded == copied and _files_are_those_of(folder, manifest, request, checkpoint)


def _files_are_those_of(folder: Path, manifest: Manifest, request: BuildRequest, checkpoint: "Checkpoint") -> bool:
    """Whether the files that ``request`` names hold what the engine in ``folder`` was built from."""
    applied = manifest.applied_policy
    try:
        recipe = Recipe.load(folder / RECIPE_FILE) if applied.needs_recipe else None
        drift = Drift.load(folder / DRIFT_FILE) if applied.needs_drift else None
    except RecipeError:
        return False
    source = calibration_source(checkpoint, request.calibration)
    return all(
        (
            request.recipe is None or recipe_for_policy(request.recipe, request.policy) == recipe,
            request.drift.file is None or Drift.load(request.drift.file) == drift,
            not (request.calibrates_recipe and applied.needs_recipe)
            or (recipe is not None and recipe.calibration.source == source),
            not (request.calibrates_drift and applied.needs_drift)
            or (drift is not None and drift.calibration.source == source),
        )
    )
