"""``python -m benchmarks.peers``, which is ``make bench ARGS=peers``: measure, write results, a page and a picture."""

import os
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.harness import busy_seconds_of_others, load, save
from benchmarks.peers.document import begun, with_tables
from benchmarks.peers.measure import Plan, Run
from benchmarks.peers.page import write_page
from benchmarks.peers.picture import draw
from benchmarks.peers.rows import ROWS, SHORT
from benchmarks.peers.subjects import SUBJECTS
from trt_kv.errors import TrtKvError

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "peers.json"
PICTURE = ROOT / "docs" / "images" / "peers.png"
MODELS = ("smollm2", "llama-3.2-1b")


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(tuple(SUBJECTS)), help=f"Default: {' and '.join(MODELS)}.")
@click.option("--row", "rows", multiple=True, type=click.Choice(tuple(ROWS)), help="Only these rows. Default: all.")
@click.option("--short", is_flag=True, help="Without --row: the rows that the aims speak of.")
@click.option("--contexts", default="512,2048,8192,32768,65536,131072", show_default=True, help="Tokens, with commas between.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1), help="Requests of each row and context.")
@click.option("--tokens", default=24, show_default=True, type=click.IntRange(2), help="Decoded tokens of each request.")
@click.option("--threads", default=0, type=click.IntRange(0), help="Of each engine. Default: one per core.")
@click.option(
    "--minutes", default=240.0, show_default=True, help="Begin nothing new after so long, without making what is missing."
)
@click.option("--job-seconds", default=120.0, show_default=True, help="Leave out requests that take longer.")
@click.option("--prepare", is_flag=True, help="Measure nothing; make environments, models and engines that are missing.")
@click.option("--resume", is_flag=True, help="Continue what an interrupted run has written.")
@click.option("--from-results", is_flag=True, help="Measure nothing; make the tables, page and picture again.")
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for results and picture instead of the default ones.",
)
def main(
    models: tuple[str, ...],
    rows: tuple[str, ...],
    short: bool,
    contexts: str,
    rounds: int,
    tokens: int,
    threads: int,
    minutes: float,
    job_seconds: float,
    prepare: bool,
    resume: bool,
    from_results: bool,
    out: Path | None,
) -> None:
    """Compare the engine with other engines on this machine.

    \b
    Examples:
      make bench ARGS=peers
      make bench ARGS="peers --model smollm2 --contexts 512,2048 --rounds 2 --minutes 20 --out /tmp/peers"
      make bench ARGS="peers --from-results"
    """
    console = Console()
    path = RESULTS if out is None else out / RESULTS.name
    try:
        plan = Plan(
            subjects=models or MODELS,
            rows=rows or (SHORT if short else tuple(ROWS)),
            contexts=_numbers(contexts),
            rounds=rounds,
            n_tokens=tokens,
            threads=threads or len(os.sched_getaffinity(0)),
            minutes=minutes,
            job_s=job_seconds,
        )
        if prepare:
            Run(plan, [], save=lambda: None, say=lambda text: console.print(text, markup=False)).prepare()
            return
        document = load(path) if from_results or (resume and path.exists()) else begun(plan)
        if not from_results:
            _measure(plan, document, path, console)
        document = with_tables(document)
        save(document, path)
        if document["tables"]:
            draw(document, PICTURE if out is None else out / PICTURE.name)
        if out is None:
            write_page(document)
    except TrtKvError as error:
        raise click.ClickException(str(error)) from error
    met = sum(target["is_met"] for target in document["targets"])
    console.print(f"{met} of {len(document['targets'])} aims are met; written to {path}")


def _measure(plan: Plan, document: dict[str, Any], path: Path, console: Console) -> None:
    started, busy, before_s = time.perf_counter(), busy_seconds_of_others(), document["elapsed_s"]
    document["settings"] = begun(plan)["settings"]

    def keep() -> None:
        document["elapsed_s"] = round(before_s + time.perf_counter() - started, 1)
        save(with_tables(document), path)

    try:
        Run(plan, document["samples"], save=keep, say=lambda text: console.print(text, markup=False)).measure()
    finally:
        used = (busy_seconds_of_others() - busy) / (time.perf_counter() - started)
        document["machine"]["cores_used_by_others"] = round(max(0.0, used), 2)


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"not numbers with commas between: {text!r}", param_hint="--contexts") from error


if __name__ == "__main__":
    main()
