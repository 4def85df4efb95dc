"""``trt-kv calibrate``: prompts become a recipe."""

from pathlib import Path

import click

from trt_kv.cli.options import any_path, calibration_options, debug_option, existing_file, model_options, policy_options
from trt_kv.cli.requests import CalibrationPlan, ModelSource
from trt_kv.errors import UsageError
from trt_kv.policy import Policy


@click.command("calibrate", short_help="Find the kept share of each layer.")
@model_options
@policy_options
@calibration_options
@click.option(
    "--from-published",
    type=existing_file,
    metavar="FILE",
    help="Take the budgets from a published list (JSON, one forgotten share per layer) instead of calibrating.",
)
@click.option(
    "--to-published",
    type=any_path,
    metavar="FOLDER",
    help="Also write the budgets in the published form, one file per forgotten share.",
)
@click.option("--out", type=any_path, metavar="FILE", help="The recipe. Default: recipes/MODEL-POLICY.json.")
@debug_option
def command(
    *,
    source: ModelSource,
    policy: Policy,
    calibration: CalibrationPlan,
    from_published: Path | None,
    to_published: Path | None,
    out: Path | None,
) -> None:
    """Find how much each layer must keep, and write it as a recipe.

    A recipe is a JSON file for people to read: kept shares per layer, and how they were found. It belongs to one
    model. A picture of the shares and of the cumulative curves is written beside it.

    \b
    Examples:
      trt-kv calibrate --budget 0.3
      trt-kv calibrate --score window --prompts prompts.txt --samples 20 --out recipes/window.json
      trt-kv calibrate --from-published llama_0.8.json --budget 0.2 --out recipes/published.json
    """
    if not policy.needs_recipe:
        raise UsageError(f"policy {policy.name!r} reads no recipe", fix="calibrate a policy that does, e.g. --policy prefixkv")
    if from_published is not None and calibration.prompts is not None:
        raise UsageError(
            "a published list is taken as it is, without prompts",
            got="--from-published and --prompts",
            expected="one of the two",
        )
    from trt_kv.cli.pipeline import calibrate_recipe

    recipe = calibrate_recipe(
        source=source,
        policy=policy,
        calibration=calibration,
        from_published=from_published,
        to_published=to_published,
        out=out or Path("recipes") / f"{source.model}-{policy.name}.json",
    )
    click.echo(f"recipe: {recipe}")
    click.echo(f"next:   trt-kv build --policy {policy.name} --recipe {recipe}")
