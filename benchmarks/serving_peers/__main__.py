"""``python -m benchmarks.serving_peers``, which is ``make bench ARGS=serving-peers``: measure, write results and their page."""

import dataclasses
import functools
import os
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.harness import begun_document, busy_seconds_of_others, load, save
from benchmarks.peers.subjects import SUBJECTS
from benchmarks.serving_peers.loads_by_others import AIPERF_FILE
from benchmarks.serving_peers.measure import Run
from benchmarks.serving_peers.page import write_page
from benchmarks.serving_peers.plan import CONCURRENCY, PARTS, SIZES, SMOLLM2, Plan
from benchmarks.serving_peers.public_tool import measure_with_aiperf
from benchmarks.serving_peers.results import tables_of, targets_of
from benchmarks.serving_peers.rows import ROWS
from trt_kv.errors import TrtKvError

RESULTS = Path(__file__).parents[1] / "results"
FILE = "serving_peers.json"
TITLE = "Servers beside other servers, on one machine, one after the other"


@click.command()
@click.option("--sizes", default="full", show_default=True, type=click.Choice(tuple(SIZES)), help="Prompts, answers and rows.")
@click.option("--short", is_flag=True, help="--sizes short: about ten minutes on two cores.")
@click.option(
    "--model",
    default=SMOLLM2,
    show_default=True,
    type=click.Choice(tuple(SUBJECTS)),
    help="Random weights in the shape of another model cannot answer: only --part concurrency.",
)
@click.option("--part", "parts", multiple=True, type=click.Choice(PARTS), help="Only these parts. Default: all.")
@click.option(
    "--row", "rows", multiple=True, type=click.Choice(tuple(ROWS)), help="Only these rows. Default: all of the sizes."
)
@click.option("--threads", default=0, type=click.IntRange(0), help="Of each engine. Default: one per core.")
@click.option("--minutes", default=180.0, show_default=True, help="Begin nothing new after so long, without what is prepared.")
@click.option("--prepare", is_flag=True, help="Measure nothing; make environments, models and engines that are missing.")
@click.option("--resume", is_flag=True, help="Continue what an interrupted run has written, or add to it.")
@click.option("--from-results", is_flag=True, help="Measure nothing; make the tables and the page again.")
@click.option("--aiperf", is_flag=True, help="Only load our server with NVIDIA's aiperf, and keep its report.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for results instead of the default one.")
def main(
    sizes: str,
    short: bool,
    model: str,
    parts: tuple[str, ...],
    rows: tuple[str, ...],
    threads: int,
    minutes: float,
    prepare: bool,
    resume: bool,
    from_results: bool,
    aiperf: bool,
    out: Path | None,
) -> None:
    """Compare our server with other servers on this machine.

    \b
    Examples:
      make bench ARGS=serving-peers
      make bench ARGS="serving-peers --short"
      make bench ARGS="serving-peers --sizes tiny --part memory --out /tmp/servers"
      make bench ARGS="serving-peers --short --model llama-3.2-1b"
      make bench ARGS="serving-peers --aiperf"
    """
    console, folder = Console(soft_wrap=True), out or RESULTS
    parts = parts or (PARTS if model == SMOLLM2 else (CONCURRENCY,))
    if model != SMOLLM2 and parts != (CONCURRENCY,):
        raise click.BadParameter(f"got {', '.join(parts)}, expected {CONCURRENCY} with --model {model}", param_hint="--part")
    path = folder / (FILE if model == SMOLLM2 else f"serving_peers_{model}.json")
    plan = Plan(
        sizes="short" if short else sizes,
        model=model,
        parts=parts,
        rows=rows,
        threads=threads or len(os.sched_getaffinity(0)),
        minutes=minutes,
    )
    try:
        if aiperf:
            save(measure_with_aiperf(threads=plan.threads), folder / AIPERF_FILE)
            console.print(f"written to {folder / AIPERF_FILE}")
            return
        if prepare:
            Run(plan, [], save=lambda: None, say=console.print, subject=SUBJECTS[model]).prepare()
            return
        document = _document(plan, path, console, resume=resume, from_results=from_results)
        save(document, path)
        if out is None:
            write_page(load(RESULTS / FILE), RESULTS)
    except TrtKvError as error:
        raise click.ClickException(str(error)) from error
    met = sum(target["is_met"] for target in document["targets"])
    console.print(f"{met} of {len(document['targets'])} aims are met; written to {path}")


def _document(plan: Plan, path: Path, console: Console, *, resume: bool, from_results: bool) -> dict[str, Any]:
    """The document of a run, or of the last one, with its tables."""
    if from_results:
        return with_tables(load(path))
    fresh = begun_document(TITLE, dataclasses.asdict(plan))
    document = load(path) if resume and path.exists() else fresh
    if document["settings"]["sizes"] != plan.sizes:
        raise click.BadParameter(f"the run to be continued has sizes {document['settings']['sizes']}", param_hint="--resume")
    started, busy, before_s = time.perf_counter(), busy_seconds_of_others(), document["elapsed_s"]

    def keep() -> None:
        document["elapsed_s"] = round(before_s + time.perf_counter() - started, 1)
        save(with_tables(document), path)

    say = functools.partial(console.print, markup=False)
    try:
        Run(plan, document["samples"], save=keep, say=say, subject=SUBJECTS[plan.model]).measure()
    finally:
        used = (busy_seconds_of_others() - busy) / (time.perf_counter() - started)
        document["machine"]["cores_used_by_others"] = round(max(0.0, used), 2)
    return with_tables(document)


def with_tables(document: dict[str, Any]) -> dict[str, Any]:
    """The document with tables and aims made from its samples."""
    samples = document["samples"]
    targets = [{**dataclasses.asdict(target), "is_met": target.is_met} for target in targets_of(samples)]
    return document | {"tables": tables_of(samples), "targets": targets}


if __name__ == "__main__":
    main()
