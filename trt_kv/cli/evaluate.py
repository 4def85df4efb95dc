"""``trt-kv evaluate``: measure an engine on the user's own tasks."""

from pathlib import Path

import click

from trt_kv.calibration.task_files import MATCHES, Match
from trt_kv.cli.evaluation_table import describe_evaluation
from trt_kv.cli.options import any_path, debug_option, digest_option, existing_file, utf8_text
from trt_kv.cli.output import say
from trt_kv.cli.progress import progress_bars, say_note
from trt_kv.cli.run_options import device_options, resource_options
from trt_kv.cli.signals import termination_unwinds
from trt_kv.pipeline import DeviceChoice, EvaluationRequest, ResourceChoice, evaluate


@click.command("evaluate", short_help="Measure how well an engine answers tasks.")
@click.argument("engine", type=any_path)
@click.option("--tasks", type=existing_file, required=True, metavar="FILE", help="Tasks file (JSON lines).")
@click.option(
    "--against",
    type=any_path,
    metavar="ENGINE|FILE",
    help="Compare with another engine of the same checkpoint, e.g. one with --policy full, or with its results file (--out).",
)
@click.option("--out", type=any_path, metavar="FILE", help="Store every answer in FILE (JSON). Run again to continue.")
@click.option("--force", is_flag=True, help="Start over even if FILE has answers.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use the first N tasks only.")
@click.option(
    "--match",
    type=click.Choice(list(MATCHES)),
    default="exact",
    show_default=True,
    help="When an answer is right: " + "; ".join(f"{name}: {meaning}" for name, meaning in MATCHES.items()) + ".",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Generate at most N tokens per task. Default: as many as the longest accepted answer needs; for contains, 64 more.",
)
@click.option(
    "--separator",
    callback=utf8_text,
    default=" ",
    metavar="TEXT",
    help="Text between prompt and expected answer if neither has white space at that point. Default: one space.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, metavar="N", help="Tasks decoded together."
)
@resource_options
@device_options
@digest_option
@debug_option
def command(
    *,
    engine: Path,
    tasks: Path,
    against: Path | None,
    out: Path | None,
    force: bool,
    limit: int | None,
    match: Match,
    max_new_tokens: int | None,
    separator: str,
    batch_size: int,
    resources: ResourceChoice,
    on: DeviceChoice,
    digest: str | None,
) -> None:
    """Run ENGINE on tasks and report accuracy, perplexity of the expected answers, kept share of the cache and time.

    Each line of the tasks file is {"prompt": "...", "expected": "..."}; "expected" may be a list of accepted
    answers, and perplexity is that of the first. Optional: "task", the group that the line is reported in, and "name", a
    unique name. Decoding is greedy, whatever the model's generation_config.json recommends.

    \b
    Examples:
      trt-kv evaluate engines/llama3-prefixkv --tasks examples/evaluate/tasks.jsonl
      trt-kv evaluate engines/small --tasks mine.jsonl --against engines/full --out results/small.json
      trt-kv evaluate engines/small --tasks mine.jsonl --match contains --limit 20
    """
    request = EvaluationRequest(
        engine=engine,
        tasks=tasks,
        against=against,
        match=match,
        max_new_tokens=max_new_tokens,
        separator=separator,
        batch_size=batch_size,
        limit=limit,
        out=out,
        force=force,
        resources=resources,
        on=on,
        digest=digest,
    )
    with termination_unwinds(), progress_bars() as on_progress:
        evaluation = evaluate(request, on_progress=on_progress, on_note=say_note)
    say(describe_evaluation(evaluation))
    if out is not None:
        say(f"\nresults  {out}")
