"""``trt-kv evaluate``: how well an engine answers one's own tasks."""

from pathlib import Path

import click

from trt_kv.calibration.task_files import MATCHES, Match
from trt_kv.cli.evaluation_table import describe_evaluation
from trt_kv.cli.options import any_path, debug_option, device_options, existing_file
from trt_kv.cli.progress import progress_bars, say_note
from trt_kv.cli.termination import termination_unwinds
from trt_kv.pipeline import DeviceChoice, EvaluationRequest, evaluate


@click.command("evaluate", short_help="Measure how well an engine answers tasks.")
@click.argument("engine", type=any_path)
@click.option("--tasks", type=existing_file, required=True, metavar="FILE", help="The tasks, as JSON lines.")
@click.option(
    "--against",
    type=any_path,
    metavar="ENGINE|FILE",
    help="Compare with another engine of this checkpoint, e.g. one with --policy full, or with its results (a file of --out).",
)
@click.option(
    "--out", type=any_path, metavar="FILE", help="Keep every answer in FILE (JSON). An interrupted evaluation continues."
)
@click.option("--force", is_flag=True, help="Evaluate again even if FILE has answers.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use the first N tasks only.")
@click.option(
    "--match",
    type=click.Choice(list(MATCHES)),
    default="exact",
    show_default=True,
    help="What is right: " + "; ".join(f"{name}: {meaning}" for name, meaning in MATCHES.items()) + ".",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    help="Generate N tokens per task. Default: as many as its longest accepted answer needs; for contains, 64 more.",
)
@click.option(
    "--separator",
    default=" ",
    metavar="TEXT",
    help="Stands between prompt and expected answer where neither has white space there. Default: one space.",
)
@click.option(
    "--batch-size", type=click.IntRange(min=1), default=8, show_default=True, metavar="N", help="Tasks that decode together."
)
@device_options
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
    on: DeviceChoice,
) -> None:
    """Let ENGINE answer tasks, and show accuracy, perplexity of the expected answers, kept share of the cache and time.

    Each line of the tasks file is {"prompt": "...", "expected": "..."}; "expected" may be a list of accepted answers, whose
    first one is measured for perplexity. "task" groups lines, "name" names one. Answers are greedy.

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
        on=on,
    )
    with termination_unwinds(), progress_bars() as on_progress:
        evaluation = evaluate(request, on_progress=on_progress, on_note=say_note)
    click.echo(describe_evaluation(evaluation))
    if out is not None:
        click.echo(f"\nresults  {out}")
