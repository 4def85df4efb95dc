"""``trt-kv export``: export a checkpoint as ONNX graphs, without building an engine."""

from pathlib import Path

import click

from trt_kv.cli.options import any_path, debug_option, drift_file_option, existing_file, model_options, policy_options
from trt_kv.cli.output import say
from trt_kv.cli.progress import progress_bars, say_note
from trt_kv.cli.signals import termination_unwinds
from trt_kv.pipeline import DriftPlan, ExportRequest, ModelSource, export_graphs
from trt_kv.policy import Policy


@click.command("export", short_help="Export the model as monolithic ONNX graphs.")
@model_options
@policy_options
@click.option("--recipe", type=existing_file, metavar="FILE", help="Budgets per layer, for a policy that reads a recipe.")
@drift_file_option
@click.option("--out", type=any_path, required=True, metavar="FOLDER", help="Folder for the graphs and their weights.")
@debug_option
def command(*, source: ModelSource, policy: Policy, recipe: Path | None, drift: Path | None, out: Path) -> None:
    """Export the whole model as ONNX, one graph for prefill and one for decode, with trt-kv's ops as nodes and shared weights.

    Use this to inspect the graphs or to pass them to another tool. To make an engine, use trt-kv build.

    \b
    Example:
      trt-kv export --policy full --out graphs/full
    """
    request = ExportRequest(source=source, policy=policy, recipe=recipe, drift=DriftPlan(file=drift), out=out)
    with termination_unwinds(), progress_bars() as on_progress:
        graphs = export_graphs(request, on_progress=on_progress, on_note=say_note)
    for graph in graphs:
        say(f"graph: {graph}")
