"""The page of a real model's report: a template filled with tables from the results alone."""

from pathlib import Path

from benchmarks.quality.pages import filled, setup_line, with_section
from benchmarks.quality.real import tables
from benchmarks.quality.real.plots import png
from benchmarks.quality.real.results import RealResults
from benchmarks.quality.real.statistics import N_RESAMPLES
from trt_kv.calibration.statistics import FEWEST_DOCUMENTS
from trt_kv.errors import ReportError
from trt_kv.json_file import write_atomically

MODES = {
    "aware": "The question is read before tokens are evicted",
    "agnostic": "The question comes after the eviction",
}


BEGIN, END = "<!-- real model: begin -->", "<!-- real model: end -->"
SHOWN_SHARES = (0.5, 0.25)


def page_with_table(text: str, results: RealResults) -> str:
    """A page of the project with the table of a real model between its markers."""
    return with_section(text, BEGIN, END, table_of_page(results))


def table_of_page(results: RealResults) -> str:
    """The table of docs/policies.md and what it means."""
    found = {mode: tables.marks_of(results, mode, results.settings.main.n_tokens) for mode in MODES}
    counts = {mode: marks.n_documents for mode, marks in found.items() if marks is not None}
    talk = results.settings.talk
    n_talks = len(results.talks[0].right) if results.talks else 0
    return filled(
        "real_table",
        table=tables.compact_table(results, SHOWN_SHARES),
        model=results.model.name,
        n_tokens=results.settings.main.n_tokens,
        weights=results.weights,
        aware=counts.get("aware", 0),
        agnostic=counts.get("agnostic", 0),
        n_talks=n_talks,
        talk_tokens=talk.n_tokens,
        talk_turns=talk.n_turns,
        talk_budget=f"{100 * talk.budgets[0]:g}",
    ).rstrip("\n")


def write_real_report(results: RealResults, out: Path) -> Path:
    """``results.json``, ``report.md``, ``summary.md`` and the picture, into the folder ``out``; the page's path."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as cause:
        raise ReportError("cannot write the report", got=f"{out}: {cause.strerror or cause}") from cause
    results.save(out / "results.json")
    page = out / "report.md"
    files = {
        page: real_markdown(results).encode(),
        out / "summary.md": (summary(results) + "\n").encode(),
        out / "kept.png": png(results),
    }
    for path, content in files.items():
        write_atomically(path, content, kind="report", error=ReportError)
    return page


def real_markdown(results: RealResults) -> str:
    """The whole page."""
    settings = results.settings
    plan, budget = settings.main, summary_budget(results)
    return filled(
        "real",
        model=results.model.name,
        n_parameters=f"{results.model.n_parameters / 1e6:.0f}",
        n_layers=results.model.n_layers,
        weights=results.weights,
        n_tokens=plan.n_tokens,
        capable_from=f"{100 * settings.capable_from:.0f}",
        summary=summary(results),
        capability_table=tables.capability_table(results),
        modes="\n\n".join(_mode_section(results, mode) for mode in MODES),
        read_table=tables.read_table(results, plan.n_tokens, budget),
        budget=f"{100 * budget:g}",
        length_table=tables.length_table(results, "aware", budget),
        talk_table=tables.talk_table(results),
        talk_tokens=settings.talk.n_tokens,
        talk_turns=settings.talk.n_turns,
        text_table=tables.text_table(results),
        n_texts=len(results.texts[0].losses) if results.texts else 0,
        text_tokens=settings.text_tokens - 1,
        page_size=results.page_size,
        page_bytes=results.page_bytes,
        samples=settings.calibration_samples,
        n_resamples=N_RESAMPLES,
        fewest=FEWEST_DOCUMENTS,
        setup=setup_line(results.versions, results.machine),
        digest=results.model.digest,
        command=results.command,
    )


def summary(results: RealResults) -> str:
    """The table for readers in a hurry: every policy at one share, in both modes."""
    plan, budget = results.settings.main, summary_budget(results)
    parts = []
    for mode, title in MODES.items():
        marks = tables.marks_of(results, mode, plan.n_tokens)
        if marks is not None:
            parts.append(
                f"**{title}**, {100 * budget:g} % kept, {plan.n_tokens} tokens, {marks.n_documents} documents:\n\n"
                f"{tables.rival_table(results, marks, budget)}"
            )
    return "\n\n".join(parts) or "The model can do none of the families with its full cache."


def summary_budget(results: RealResults) -> float:
    """The share of tables that show only one."""
    return min(results.settings.main.budgets, key=lambda budget: abs(budget - 0.25))


def _mode_section(results: RealResults, mode: str) -> str:
    plan = results.settings.main
    marks = tables.marks_of(results, mode, plan.n_tokens)
    if marks is None:
        return ""
    budget = summary_budget(results)
    return (
        f"## {MODES[mode]}\n\nMean marks in %, {marks.n_documents} documents of {len(marks.cells)} families.\n\n"
        f"{tables.share_table(results, marks, plan.budgets)}\n\n"
        f"Per family, {100 * budget:g} % kept or the policy's own budget:\n\n"
        f"{tables.family_table(results, mode, plan.n_tokens, budget)}"
    )
