"""``trt-kv export``: a checkpoint becomes ONNX graphs, without an engine around them."""

from pathlib import Path

import click

from trt_kv.cli.options import any_path, debug_option, drift_file_option, existing_file, model_options, policy_options
from trt_kv.pipeline.plans import DriftPlan, ModelSource, check_drift_is_read, check_recipe_is_read
from trt_kv.policy import Policy


@click.command("export", short_help="Write the model as one ONNX graph.")
@model_options
@policy_options
@click.option("--recipe", type=existing_file, metavar="FILE", help="Budgets per layer, for a policy that reads a recipe.")
@drift_file_option
@click.option("--out", type=any_path, required=True, metavar="FOLDER", help="Folder for the graph and its weights.")
@debug_option
def command(*, source: ModelSource, policy: Policy, recipe: Path | None, drift: Path | None, out: Path) -> None:
    """Write the whole model as one ONNX graph, with trt-kv's ops as nodes and the weights beside it.

    For reading the graph, or for another tool; an engine is made by trt-kv build.

    \b
    Example:
      trt-kv export --policy full --out graphs/full
    """
    check_recipe_is_read(policy, recipe)
    thresholds = DriftPlan(file=drift)
    check_drift_is_read(policy, thresholds)
    from trt_kv.pipeline.build import export_graphs

    for graph in export_graphs(source=source, policy=policy, recipe=recipe, drift=thresholds, out=out):
        click.echo(f"graph: {graph}")
