"""The options of ``python -m benchmarks.quality`` for another model than the bundled one."""

from collections.abc import Collection
from pathlib import Path

import click

from benchmarks.quality.real import plans
from benchmarks.quality.real.command import measured_model
from benchmarks.quality.real.page import page_with_table, write_real_report
from benchmarks.quality.real.results import RealResults
from trt_kv.errors import ReportError, UsageError
from trt_kv.json_file import write_atomically
from trt_kv.presets import preset

ROOT = Path(__file__).resolve().parents[3]
PAGE = ROOT / "docs" / "policies.md"


def real_report(
    model: str,
    *,
    quick: bool,
    from_results: Path | None,
    out: Path | None,
    minutes: float | None,
    known: Path | None = None,
    only: Collection[str] = (),
) -> Path:
    """Measure a named model, or take a results file of it, and write its report. The page's path.

    ``known``: a results file whose rows are not measured again; ``only``: what is measured, if not all (``parts_of``).
    ``UsageError`` if they are given and nothing is to be measured.
    """
    preset(model)
    if minutes is not None and minutes <= 0:
        raise UsageError("there is no time to measure anything", got=f"--minutes {minutes:g}", expected="more than 0")
    if (known is not None or only) and from_results is not None:
        got = f"--known {known}" if known is not None else f"--only {' --only '.join(only)}"
        raise UsageError("--from-results measures nothing", got=got, fix="use only one of the two options")
    out = out or (ROOT / "build" / f"report-{model}" if quick else ROOT / "docs" / "report" / model)
    if from_results is not None:
        results = RealResults.load(from_results)
    else:
        results = measured_model(
            model,
            plans.QUICK if quick else plans.FULL,
            ROOT / "build" / f"report-parts-{model}",
            minutes=minutes,
            command=["python", "-m", "benchmarks.quality", "--model", model, *(["--quick"] if quick else [])],
            tell=lambda message: click.echo(message, err=True),
            known=None if known is None else RealResults.load(known),
            only=only,
        )
    page = write_real_report(results, out)
    if out.resolve() == ROOT / "docs" / "report" / "smollm2":
        content = page_with_table(PAGE.read_text(encoding="utf-8"), results)
        write_atomically(PAGE, content.encode(), kind="page", error=ReportError)
    return page
