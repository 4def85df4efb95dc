"""Prompts -> a file with a recipe or drift thresholds, and its plot."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trt_kv.errors import UsageError
from trt_kv.pipeline.calibration_runs import drift_from_prompts, recipe_from_prompts, recipe_model
from trt_kv.pipeline.callbacks import OnNote, OnProgress, ignore
from trt_kv.pipeline.destinations import check_new_file, check_new_folder
from trt_kv.pipeline.given_files import policy_of_recipe, recipe_for_policy
from trt_kv.pipeline.requests import DriftRequest, RecipeRequest
from trt_kv.pipeline.sources import open_source
from trt_kv.policy import Policy
from trt_kv.published_recipe import recipe_from_published, write_published
from trt_kv.recipe import Protected, Recipe, recipe_score

if TYPE_CHECKING:
    from trt_kv.export.checkpoints.base import Checkpoint


@dataclass(frozen=True, kw_only=True)
class RecipeFiles:
    """The files that a calibration wrote; ``published`` is None unless that format was requested."""

    recipe: Path
    picture: Path
    published: Path | None


def calibrate_recipe(request: RecipeRequest, *, on_progress: OnProgress = ignore, on_note: OnNote = ignore) -> RecipeFiles:
    """Write a recipe to ``request.out`` and its plot beside it; optionally also in the published format.

    Raises ``CheckpointError`` and ``UsageError`` for what cannot be read or does not fit the policy.

    Example::

        from pathlib import Path

        from trt_kv.pipeline import CalibrationPlan, ModelSource, RecipeRequest, calibrate_recipe
        from trt_kv.policies import policy_from_name

        request = RecipeRequest(
            source=ModelSource(model="llama3", checkpoint="models/mine"),
            policy=policy_from_name("prefixkv"),
            calibration=CalibrationPlan(prompts=Path("prompts.txt")),
            out=Path("recipes/mine.json"),
        )
        print(calibrate_recipe(request).picture)
    """
    from trt_kv.calibration.recipe_plot import picture_from_recipe
    from trt_kv.runtime.processes import will_compute

    will_compute()
    out, policy = request.out, request.policy
    check_new_file(out, "--out")
    picture = _picture_beside(out, "recipe")
    published = request.from_published or request.to_published
    if policy.scoring.predicts and published is not None:
        raise UsageError(
            f"the recipe of policy {policy.name!r} has no published form",
            got=str(published),
            expected="no --from-published or --to-published",
            fix="KVzap's published weights read the input of attention; calibrate these, which read keys and values",
        )
    if request.to_published is not None:
        check_new_folder(request.to_published, "--to-published")
    for folder in {out.parent, request.to_published or out.parent}:
        folder.mkdir(parents=True, exist_ok=True)
    checkpoint = open_source(request.source, on_note)
    if request.from_published is not None:
        recipe = _published(request.from_published, checkpoint, policy)
        policy_of_recipe(policy, recipe, on_note)
    else:
        recipe = recipe_from_prompts(checkpoint, policy, request.calibration, on_progress=on_progress, on_note=on_note)
    recipe.save(out)
    picture_from_recipe(recipe, picture)
    written = _publish(recipe, request.to_published) if request.to_published is not None else None
    return RecipeFiles(recipe=out, picture=picture, published=written)


def _published(path: Path, checkpoint: "Checkpoint", policy: Policy) -> Recipe:
    """The recipe of a published file: PrefixKV's list, or for a policy with a budget for each KV head, LU-KV's curves.

    Raises ``UsageError`` for a file of the other kind.
    """
    from trt_kv.calibration.head_curves import recipe_from_curves

    is_of_heads = path.suffix == ".npy"
    if is_of_heads != (policy.heads == "own"):
        raise UsageError(
            f"policy {policy.name!r} has a budget for each {'KV head' if policy.heads == 'own' else 'layer'}",
            got=str(path),
            expected="curves of KV heads (.npy)" if policy.heads == "own" else "a list with a share for each layer (.json)",
            fix="take --policy lukv for curves, prefixkv for a list",
        )
    model, score = recipe_model(checkpoint), recipe_score(policy)
    if not is_of_heads:
        return recipe_from_published(path, model=model, score=score)
    return recipe_from_curves(
        path,
        model=model,
        n_kv_heads=checkpoint.config.n_kv_heads,
        score=score,
        budget=policy.kept,
        protected=Protected(sinks=policy.sinks, recent=policy.recent),
    )


def _publish(recipe: Recipe, folder: Path) -> Path:
    """Write the recipe in its published form."""
    from trt_kv.calibration.head_curves import write_curves

    return write_published(recipe, folder) if recipe.heads is None else write_curves(recipe, recipe.heads, folder)


def calibrate_drift(request: DriftRequest, *, on_progress: OnProgress = ignore, on_note: OnNote = ignore) -> Path:
    """Write drift thresholds to ``request.out`` and their plot beside it, measured with the recipe if the policy needs one.

    Returns ``request.out``. Raises ``CheckpointError``, ``RecipeError`` and ``UsageError`` for what cannot be read or does not
    fit together.

    Example::

        import dataclasses
        from pathlib import Path

        from trt_kv.pipeline import DriftPlan, DriftRequest, ModelSource, calibrate_drift
        from trt_kv.policies import policy_from_name

        policy = dataclasses.replace(policy_from_name("freekv"), tokens=512, drift="calibrated")
        source, drift = ModelSource(model="llama3"), DriftPlan(rate=0.05)
        calibrate_drift(DriftRequest(source=source, policy=policy, drift=drift, out=Path("recipes/drift.json")))
    """
    from trt_kv.calibration.drift_plot import picture_from_drift
    from trt_kv.runtime.processes import will_compute

    will_compute()
    out, policy = request.out, request.policy
    check_new_file(out, "--out")
    picture = _picture_beside(out, "thresholds")
    checkpoint = open_source(request.source, on_note)
    checkpoint.config.check_page_size(request.drift.page_size)
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = recipe_for_policy(request.recipe, policy) if request.recipe is not None else None
    if recipe is not None:
        recipe.check_model(digest=checkpoint.digest, n_layers=checkpoint.config.n_layers)
        policy = policy_of_recipe(policy, recipe, on_note)
    elif policy.needs_recipe:
        recipe = recipe_from_prompts(checkpoint, policy, request.calibration, on_progress=on_progress, on_note=on_note)
    thresholds = drift_from_prompts(
        checkpoint, policy, request.calibration, request.drift, recipe, on_progress=on_progress, on_note=on_note
    )
    thresholds.save(out)
    picture_from_drift(thresholds, picture)
    return out


def _picture_beside(out: Path, what: str) -> Path:
    picture = out.with_suffix(".png")
    if picture == out:
        raise UsageError(f"the picture would overwrite the {what}", got=f"--out {out}", expected="a name that ends in .json")
    return picture
