"""``trt-kv calibrate``: calibrate a recipe or drift thresholds on prompts."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import click

from trt_kv.cli.hints import command_line
from trt_kv.cli.options import (
    any_path,
    calibration_options,
    debug_option,
    drift_options,
    existing_file,
    model_options,
    policy_options,
)
from trt_kv.cli.output import say
from trt_kv.cli.progress import progress_bars, say_note
from trt_kv.errors import UsageError
from trt_kv.pipeline import (
    BuildRequest,
    CalibrationPlan,
    DriftPlan,
    DriftRequest,
    ModelSource,
    RecipeRequest,
    TargetPlan,
    calibrate_drift,
    calibrate_queries,
    calibrate_recipe,
)
from trt_kv.pipeline.names import default_name
from trt_kv.pipeline.reproduce import build_words
from trt_kv.pipeline.requests import check_drift_is_read, check_reads_recipe
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy


@click.command("calibrate", short_help="Find the kept share, or the drift threshold, of each layer.")
@model_options
@policy_options
@calibration_options
@drift_options(with_file=False)
@click.option(
    "--from-published",
    type=existing_file,
    metavar="FILE",
    help="Take the budgets from a published file instead of calibrating: PrefixKV's list (JSON, one forgotten share per "
    "layer), or LU-KV's curves as kvpress has them (.npy, with --policy lukv).",
)
@click.option(
    "--to-published",
    type=any_path,
    metavar="FOLDER",
    help="Also write the budgets in the published form: a list per forgotten share, or the curves of KV heads.",
)
@click.option(
    "--recipe",
    type=existing_file,
    metavar="FILE",
    help="Recipe that is applied while drift is measured, for a policy with budget=recipe. Default: calibrate one first.",
)
@click.option(
    "--out",
    type=any_path,
    metavar="FILE",
    help="Default: recipes/NAME.json, for drift recipes/NAME-drift.json: the model or checkpoint, the policy, and each "
    "option not at its default.",
)
@click.option(
    "--queries",
    is_flag=True,
    help="Write statistics of the heads' queries before RoPE instead, for TriAttention (--target tensorrt-llm); of the policy "
    "nothing is read.",
)
@debug_option
def command(
    *,
    source: ModelSource,
    policy: Policy,
    calibration: CalibrationPlan,
    drift: DriftPlan,
    from_published: Path | None,
    to_published: Path | None,
    recipe: Path | None,
    out: Path | None,
    queries: bool,
) -> None:
    """Calibrate the kept share of each layer (a recipe); or, for a policy that recalls pages, the drift threshold of each
    layer: the cosine of adjacent queries below which a KV head selects its pages again.

    A recipe is a readable JSON file with the kept share of each layer and how it was found. It is valid for one
    checkpoint. A plot of the shares and of the cumulative curves is written beside it. For a policy whose KV heads have
    budgets of their own (lukv, --set heads=own) it has the share of each head at 99 budgets, found by what the model's
    answers to the prompts attend to; --recipe FILE --budget B then builds with any of them. For a policy whose scores are
    predicted (kvzap) it has the weights of the prediction and thresholds for 99 budgets: prompts like those in production
    matter here, since the weights are fitted to them.

    Drift thresholds (policies freekv, quest, arkvale) are a JSON file too. It has a tau for each layer, chosen so that
    --correction-rate of its KV heads are corrected, and the similarity of adjacent queries and of the pages they select,
    per layer and KV head. With --set budget=recipe the command writes a recipe; with --set budget=recipe
    drift=calibrated it writes the thresholds under that recipe.

    \b
    Examples:
      trt-kv calibrate --budget 0.3
      trt-kv calibrate --score window --prompts prompts.txt --samples 20 --out recipes/window.json
      trt-kv calibrate --from-published llama_0.8.json --budget 0.2 --out recipes/published.json
      trt-kv calibrate --policy lukv --from-published ea_0.02_llama_avg_ratio.npy --budget 0.3 --out recipes/heads.json
      trt-kv calibrate --policy freekv --set tokens=512 --correction-rate 0.05
      trt-kv calibrate --queries --checkpoint ~/models/Qwen3-8B --out qwen3-8b.safetensors
    """
    if queries:
        _refuse(
            {"--from-published": from_published, "--to-published": to_published, "--recipe": recipe}, "these are statistics"
        )
        path = out or _default_out(source, policy, calibration, drift, "-queries.safetensors")
        with progress_bars() as on_progress:
            queried = calibrate_queries(source, calibration, path, on_progress=on_progress, on_note=say_note)
        say(f"queries: {queried}")
        return
    if policy.needs_drift or (policy.recalls and not policy.needs_recipe):
        policy = _with_thresholds(policy)
        _refuse({"--from-published": from_published, "--to-published": to_published}, "thresholds have no published form")
        _calibrate_drift(source, policy, calibration, drift, recipe, out)
        return
    check_reads_recipe(policy)
    check_drift_is_read(policy, drift)
    _refuse({"--recipe": recipe}, "this command produces a recipe")
    request = RecipeRequest(
        source=source,
        policy=policy,
        calibration=calibration,
        from_published=from_published,
        to_published=to_published,
        out=out or _default_out(source, policy, calibration, drift, ".json"),
    )
    with progress_bars() as on_progress:
        written = calibrate_recipe(request, on_progress=on_progress, on_note=say_note)
    if written.published is not None:
        say(f"published form: {written.published}")
    say(f"recipe: {written.recipe}")
    say(f"next:   {_build_with(source, policy, recipe=written.recipe)}")


def _calibrate_drift(
    source: ModelSource, policy: Policy, calibration: CalibrationPlan, drift: DriftPlan, recipe: Path | None, out: Path | None
) -> None:
    request = DriftRequest(
        source=source,
        policy=policy,
        calibration=calibration,
        drift=drift,
        recipe=recipe,
        out=out or _default_out(source, policy, calibration, drift, "-drift.json"),
    )
    with progress_bars() as on_progress:
        written = calibrate_drift(request, on_progress=on_progress, on_note=say_note)
    say(f"drift:  {written}")
    thresholds = DriftPlan(file=written, page_size=drift.page_size)
    say(f"next:   {_build_with(source, policy, recipe=recipe, drift=thresholds)}")


def _default_out(source: ModelSource, policy: Policy, calibration: CalibrationPlan, drift: DriftPlan, suffix: str) -> Path:
    target = TargetPlan(page_size=drift.page_size)
    build = BuildRequest(source=source, policy=policy, calibration=calibration, drift=drift, target=target, out=Path())
    return Path("recipes") / f"{default_name(build)}{suffix}"


def _build_with(source: ModelSource, policy: Policy, *, recipe: Path | None, drift: DriftPlan | None = None) -> str:
    """The command that builds an engine with what was calibrated."""
    drift = drift or DriftPlan()
    target = TargetPlan(page_size=drift.page_size)
    request = BuildRequest(source=source, policy=policy, recipe=recipe, drift=drift, target=target, out=Path())
    return command_line(build_words(request))


def _with_thresholds(policy: Policy) -> Policy:
    """``policy`` with a calibrated tau; ``UsageError`` if the user set a fixed one."""
    if policy.drift == "fixed" and policy.tau != policy_from_name(policy.name).tau:
        raise UsageError("tau is the result of this calibration", got=f"--set tau={policy.tau}", fix="leave tau out")
    return dataclasses.replace(policy, drift="calibrated")


def _refuse(options: Mapping[str, Path | None], reason: str) -> None:
    for name, value in options.items():
        if value is not None:
            raise UsageError(
                f"{name} does not apply to this calibration: {reason}", got=f"{name} {value}", fix=f"leave {name} out"
            )
