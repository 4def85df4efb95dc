"""``python -m benchmarks.quality``: measure quality against kept share on the bundled model, and write the report."""

# Modules. What is measured: plans (how much), tasks, policies. How: steps, harness, recipes, measure_cells, effort, measure.
# The results file: results, cell. Output: pages fills templates/ with tables and verdicts; plots/ draws. recall/ has the same
# for policies whose cache stays on the host: another harness, results file and page, on the same documents.

import shlex
import sys
import tempfile
from pathlib import Path

import click

from benchmarks.quality.measure import measure
from benchmarks.quality.pages import recall_markdown, report_markdown, summary_markdown, with_section
from benchmarks.quality.plans import FULL_HOST_PLANS, FULL_SETTINGS, QUICK_HOST_PLANS, QUICK_SETTINGS
from benchmarks.quality.plots.pictures import pictures
from benchmarks.quality.real.run import real_report
from benchmarks.quality.recall.measure import measure_recall
from benchmarks.quality.recall.plots import recall_pictures
from benchmarks.quality.recall.results import RecallResults
from benchmarks.quality.results import Results
from trt_kv.cli.progress import progress_bars
from trt_kv.errors import ReportError, TrtKvError, UsageError
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest, build_engine
from trt_kv.json_file import write_atomically
from trt_kv.policies import policy_from_name
from trt_kv.presets import preset

ROOT = Path(__file__).resolve().parents[2]
PARTS = ROOT / "build" / "report-parts"
COMMITTED = ROOT / "docs" / "report"
PAGE = ROOT / "docs" / "policies.md"
BUNDLED = "llama3"
BEGIN, END = "<!-- report summary: begin -->", "<!-- report summary: end -->"


@click.command(help=__doc__)
@click.option("--quick", is_flag=True, help="a few short documents and two kept shares: a minute, and wide intervals")
@click.option(
    "--from-results",
    type=click.Path(path_type=Path),
    help="measure nothing; render this results file again, and recall.json in the same folder",
)
@click.option(
    "--model", default=BUNDLED, help="a named model, such as smollm2: another report, of tasks for models that can talk"
)
@click.option("--minutes", type=float, help="with --model: stop measuring then, and report what there is; the next run goes on")
@click.option(
    "--known",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="with --model: a results file of the same model and versions whose rows are not measured again, such as the committed "
    "one, docs/report/smollm2/results.json; what is not in it is added, policies of other names among it",
)
@click.option(
    "--only",
    multiple=True,
    metavar="PART",
    help="with --model: measure this part alone, a length such as 2048, texts or talks; of the others the report has what is "
    "known; may be given several times",
)
@click.option("--recall-only", is_flag=True, help="measure only host-resident policies; take the rest from docs/report")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="where to write; default docs/report, with --quick build/report",
)
def main(
    quick: bool,
    from_results: Path | None,
    recall_only: bool,
    out: Path | None,
    model: str,
    minutes: float | None,
    known: Path | None,
    only: tuple[str, ...],
) -> None:
    """Measure or load results, then write tables and pictures; the committed report fills a table of docs/policies.md too."""
    try:
        if model != BUNDLED:
            if recall_only:
                raise UsageError("--recall-only is of the bundled model's report", got=f"--model {model}", fix="leave it out")
            page = real_report(model, quick=quick, from_results=from_results, out=out, minutes=minutes, known=known, only=only)
            click.echo(f"report: {page}")
            return
        given = {"--minutes": minutes, "--known": known, "--only": ", ".join(only) or None}
        for option, value in given.items():
            if value is not None:
                raise UsageError("the bundled model's report is measured whole", got=f"{option} {value}", fix="leave it out")
        out = out or (ROOT / "build" / "report" if quick else COMMITTED)
        if recall_only and (quick or from_results):
            raise UsageError("--recall-only takes all other results from docs/report", fix="use only one of the two options")
        if from_results:
            results, recall = Results.load(from_results), RecallResults.load(from_results.with_name("recall.json"))
        else:
            results, recall = measured(quick=quick, known=Results.load(COMMITTED / "results.json") if recall_only else None)
        write_report(results, recall, out)
        if out.resolve() == COMMITTED:
            summary = summary_markdown(results, recall)
            content = page_with_summary(PAGE.read_text(encoding="utf-8"), summary)
            write_atomically(PAGE, content.encode(), kind="page", error=ReportError)
    except TrtKvError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo(f"report: {out / 'report.md'}")


def measured(*, quick: bool, known: Results | None = None) -> tuple[Results, RecallResults]:
    """Results on the bundled checkpoint, through an engine built for the purpose; parts are kept in ``build``.

    ``known``: the results of policies that drop tokens, if they need not be measured.
    """
    checkpoint = open_checkpoint(preset("llama3").bundled_folder)
    command = shlex.join(["python", "-m", "benchmarks.quality", *(["--quick"] if quick else [])])
    settings, plans = (QUICK_SETTINGS, QUICK_HOST_PLANS) if quick else (FULL_SETTINGS, FULL_HOST_PLANS)
    folder = PARTS / ("quick" if quick else "full")
    with progress_bars() as on_progress, tempfile.TemporaryDirectory() as scratch:
        engine = Path(scratch) / "engine"
        build_engine(EngineRequest(checkpoint=checkpoint, policy=policy_from_name("full")), engine, on_progress=on_progress)
        results = known or measure(
            checkpoint,
            engine,
            settings,
            folder=folder,
            command=command,
            on_progress=on_progress,
            tell=lambda message: click.echo(message, err=True),
        )
        recall = measure_recall(checkpoint, engine, settings, plans, folder=folder, command=command, on_progress=on_progress)
    return results, recall


def write_report(results: Results, recall: RecallResults, out: Path) -> None:
    """``results.json`` and ``recall.json``, their pages, ``summary.md`` and the pictures, into the folder ``out``."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise ReportError("cannot write the report", got=f"{out}: {cause.strerror or cause}") from cause
    results.save(out / "results.json")
    recall.save(out / "recall.json")
    files = {
        "report.md": report_markdown(results, recall).encode(),
        "recall.md": recall_markdown(recall, results).encode(),
        "summary.md": (summary_markdown(results, recall) + "\n").encode(),
        **pictures(results),
        **recall_pictures(recall, results),
    }
    for name, content in files.items():
        write_atomically(out / name, content, kind="report", error=ReportError)


def page_with_summary(text: str, summary: str) -> str:
    """``text`` with ``summary`` between its markers. ``ReportError`` unless each marker occurs once, in order."""
    return with_section(text, BEGIN, END, summary)


if __name__ == "__main__":
    main()
