"""``trt-kv build``: build an engine from a checkpoint."""

import dataclasses
from pathlib import Path

import click

from trt_kv.cli.hints import as_argument, command_line
from trt_kv.cli.options import (
    any_path,
    calibration_options,
    debug_option,
    drift_options,
    existing_file,
    model_options,
    policy_options,
    target_options,
)
from trt_kv.cli.output import say
from trt_kv.cli.progress import progress_bars, say_note
from trt_kv.cli.signals import termination_unwinds
from trt_kv.cli.weight_options import weight_options
from trt_kv.errors import EngineError
from trt_kv.pipeline import BuildRequest, CalibrationPlan, DriftPlan, ModelSource, TargetPlan, WeightPlan, build_engine
from trt_kv.pipeline.kernels_beside import kernels_beside
from trt_kv.pipeline.names import default_name
from trt_kv.pipeline.plans import TENSORRT_LLM
from trt_kv.policy import Policy


@click.command("build", short_help="Build an engine from a checkpoint.")
@model_options
@policy_options
@click.option("--recipe", type=existing_file, metavar="FILE", help="Use this recipe instead of calibrating one.")
@drift_options(with_file=True)
@calibration_options
@target_options
@weight_options
@click.option(
    "--out",
    type=any_path,
    metavar="FOLDER",
    help="Engine folder. Default: engines/NAME, the model or checkpoint, the policy, and each option not at its default.",
)
@click.option("--where", is_flag=True, help="Print the engine folder of this command, and build nothing.")
@click.option("--force", is_flag=True, help="Replace an existing engine.")
@debug_option
def command(
    *,
    source: ModelSource,
    policy: Policy,
    recipe: Path | None,
    drift: DriftPlan,
    calibration: CalibrationPlan,
    target: TargetPlan,
    weights: WeightPlan,
    out: Path | None,
    where: bool,
    force: bool,
) -> None:
    """Build an engine from a checkpoint; with --target tensorrt-llm, a folder for TensorRT-LLM with the nearest options.

    If the policy needs a recipe or drift thresholds and --recipe or --drift does not provide them, they are calibrated
    first. The engine folder appears complete or not at all.

    \b
    Examples:
      trt-kv build
      trt-kv build --policy prefixkv --budget 0.3 --score window --out engines/small
      trt-kv build --policy freekv --set tokens=512 drift=calibrated --correction-rate 0.05
      trt-kv build --checkpoint ~/models/Llama-3.2-1B --policy full --out engines/full
      trt-kv build --checkpoint ~/models/Llama-3.2-1B.Q4_K_M.gguf --quant int4
      trt-kv build --checkpoint ~/models/Llama-3.1-8B --target tensorrt --profile datacenter --dtype bfloat16
      trt-kv build --checkpoint ~/models/Qwen3-8B --target tensorrt-llm --policy h2o --context 16384
    """
    request = BuildRequest(
        source=source,
        policy=policy,
        recipe=recipe,
        drift=drift,
        calibration=calibration,
        target=target,
        weights=weights,
        out=out or Path(),
        replace=force,
    )
    if out is None:
        request = dataclasses.replace(request, out=Path("engines") / default_name(request))
    if where:
        click.echo(request.out)
        return
    with termination_unwinds(), progress_bars() as on_progress, kernels_beside(request, on_progress):
        engine = build_engine(request, on_progress=on_progress, on_note=say_note)
    if target.target == TENSORRT_LLM:
        say(f"folder: {engine}")
        say(f"next:   read {engine / 'README.md'}, which tells what of the policy is lost and how to start it")
        return
    say(f"engine: {engine}")
    say(f"next:   {command_line(_next_command(engine))}")


def _next_command(engine: Path) -> list[str]:
    """To talk with the engine's model, or to continue a text with one that was not trained on conversations."""
    from trt_kv.chat.templates import chat_templates

    files = {path.name: path for path in engine.glob("*")}
    if chat_templates(files, owner=str(engine), error=EngineError).templates:
        return ["chat", as_argument(engine)]
    return ["generate", as_argument(engine), "a prompt"]
