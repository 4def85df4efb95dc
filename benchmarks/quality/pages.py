"""The report's pages: Markdown templates filled with tables and numbers from the results alone."""

import re
from collections.abc import Iterable
from pathlib import Path
from string import Template

from benchmarks.quality import tables, verdicts
from benchmarks.quality.cell import Cell
from benchmarks.quality.comparisons import COMPARISONS, percent
from benchmarks.quality.recall import tables as recall_tables
from benchmarks.quality.recall.results import RecallResults
from benchmarks.quality.results import Machine, Results, Versions
from trt_kv.errors import ReportError

TEMPLATES = Path(__file__).parent / "templates"


def report_markdown(results: Results, recall: RecallResults) -> str:
    """Quality against the kept share, of the policies that drop tokens."""
    settings, cells = results.settings, results.main_cells()
    contexts = [plan.context_length for plan in settings.contexts]
    presets = results.in_groups("published", "ours")
    own_budgets = [f"### {policy.label}\n\n{tables.own_budget_table(results, policy)}" for policy in presets if policy.adaptive]
    return filled(
        "report",
        model=results.model.name,
        n_parameters=f"{results.model.n_parameters / 1e6:.1f}",
        n_layers=results.model.n_layers,
        n_tasks=len(results.tasks),
        contexts=_listed(contexts),
        main_context=settings.main_context,
        summary=summary_markdown(results, recall),
        best_table=verdicts.best_table(results),
        shares=_listed(map(percent, settings.budgets)),
        rival_table=verdicts.rival_table(results),
        weak_table=verdicts.weak_table(results),
        lossless_table=verdicts.lossless_table(results),
        capable_from=percent(settings.capable_from),
        capability_table=tables.capability_table(results),
        tasks="\n\n".join(_task_section(results, cell) for cell in results.compared()),
        summary_budget=percent(settings.summary_budget),
        context_table=tables.context_table(
            presets, {str(context): results.late(context) for context in contexts}, settings.summary_budget
        ),
        own_budgets="\n\n".join(own_budgets),
        threshold_table=tables.threshold_table(results),
        ablation_table=tables.ablation_table(results),
        sink_table=tables.sink_table(results),
        choice_table=verdicts.choice_table(results, cells, settings.budgets, COMPARISONS),
        recipe_table=tables.recipe_table(results),
        kept_table=tables.kept_table(results),
        page_size=results.page_size,
        page_bytes=results.page_bytes,
        memory_table=tables.memory_table(results),
        seed_table=tables.seed_table(results),
        document_table=tables.document_table(settings),
        most_facts=settings.most_facts,
        calibration_samples=settings.calibration_samples,
        calibration_context=settings.calibration_context,
        calibration_seed=settings.calibration_seed,
        seeds=_listed(settings.seeds),
        setup=setup_line(results.versions, results.machine),
        minutes=_minutes(results.cells),
        digest=results.model.digest,
        policy_table=tables.policy_table(results.policies),
    )


def recall_markdown(recall: RecallResults, results: Results) -> str:
    """Quality and traffic of the policies whose whole cache stays on the host."""
    cells = recall_tables.measured_cells(recall, results)
    swept = [cell for cell in cells if cell.host.has(recall.in_groups("tau")[0].name, recall.swept_budget)]
    taus = [(cell, budget) for cell in swept for budget in recall.main.sweep_budgets]
    return filled(
        "recall",
        model=results.model.name,
        main_context=recall.main.context_length,
        page_size=recall.main.page_size,
        sinks=recall.sinks,
        recent=recall.recent,
        shares=_listed(map(percent, recall.main.budgets)),
        rival_table=recall_tables.rival_table(recall, results, cells),
        tasks="\n\n".join(_recall_section(recall, results, cell) for cell in cells),
        tau_tables="\n\n".join(
            f"### {cell.name.capitalize()}, {percent(budget)} % attended\n\n{recall_tables.tau_table(recall, cell, budget)}"
            for cell, budget in taus
        ),
        swept_budget=percent(recall.swept_budget),
        swept_task=swept[0].name,
        heads_table=recall_tables.heads_table(recall, swept[0], recall.swept_budget),
        traffic_tables="\n\n".join(
            f"### {cell.name.capitalize()}: traffic\n\n{recall_tables.traffic_table(recall, cell)}" for cell in cells
        ),
        choice_table=verdicts.choice_table(
            results, [(cell.name, cell.all) for cell in cells], recall.main.budgets, recall_tables.COMPARISONS
        ),
        page_table=recall_tables.page_table(recall, results, recall.swept_budget),
        context_table=recall_tables.context_table(recall, results, recall.swept_budget),
        document_table=recall_tables.document_table(recall, results),
        setup=setup_line(recall.versions, recall.machine),
        minutes=_minutes(recall.cells),
        digest=recall.model_digest,
        policy_table=tables.policy_table(recall.policies),
    )


def summary_markdown(results: Results, recall: RecallResults) -> str:
    """The table of docs/policies.md: every policy on every kind of task at one kept share, or at its adaptive budget."""
    budget = results.settings.summary_budget
    return filled(
        "summary",
        table=tables.table(
            ["policy", *[name for name, _ in results.main_cells()]],
            [*tables.summary_rows(results), *recall_tables.summary_rows(recall, results)],
        ),
        main_context=results.settings.main_context,
        budget=percent(budget),
        documents=_listed(f"{len(cell.documents)} {name}" for name, cell in results.main_cells()),
        page_size=recall.main.page_size,
        sinks=recall.sinks,
        recent=recall.recent,
    ).rstrip("\n")


def with_section(text: str, begin: str, end: str, content: str) -> str:
    """``text`` with ``content`` between two markers. ``ReportError`` unless each occurs once, in order."""
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end or begin in after or end in after:
        raise ReportError("the page has no place for the report's summary", expected=f"{begin} and {end}, once each, in order")
    return f"{before}{begin}\n{content}\n{end}{after}"


def _task_section(results: Results, cell: Cell) -> str:
    task, policies = results.task(cell.task), results.in_groups("published", "ours")
    answers = tables.budget_table(results, cell, policies, lambda row: tables.share(row.accuracy))
    return filled(
        "task",
        title=task.title,
        n_documents=len(cell.documents),
        description=task.description,
        accuracy=f"Exact answers, %:\n\n{answers}" if task.asks else "",
        perplexity=tables.budget_table(results, cell, policies, lambda row: tables.ratio(cell.perplexity(row))),
        agreement=tables.budget_table(results, cell, policies, lambda row: tables.share(cell.agreement(row))),
    ).rstrip("\n")


def _recall_section(recall: RecallResults, results: Results, cell: recall_tables.Measured) -> str:
    perplexity = recall_tables.quality_table(recall, results, cell, lambda row: tables.ratio(cell.all.perplexity(row)))
    answers = recall_tables.quality_table(recall, results, cell, lambda row: tables.share(row.accuracy))
    hidden = f"<details><summary>Perplexity of the right answer</summary>\n\n{perplexity}\n\n</details>"
    return filled(
        "recall_task",
        title=cell.name.capitalize(),
        n_documents=len(cell.all.documents),
        quality=f"Exact answers, %:\n\n{answers}" if cell.asks else f"Perplexity:\n\n{perplexity}",
        perplexity=hidden if cell.asks else "",
    ).rstrip("\n")


def filled(template: str, **values: object) -> str:
    """A template filled with its values; empty values leave no gap."""
    text = Template((TEMPLATES / f"{template}.md").read_text(encoding="utf-8")).substitute(values)
    return re.sub(r"\n{3,}", "\n\n", text)


def _listed(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def setup_line(versions: Versions, machine: Machine) -> str:
    """Versions and machine of a measurement."""
    return (
        f"{versions.executor}, trt-kv {versions.trt_kv}, torch {versions.torch}, numpy {versions.numpy}, Python"
        f" {versions.python}; {machine.cpu}, {machine.n_cores} cores, {machine.system}"
    )


def _minutes(cells: Iterable[Cell]) -> str:
    return f"{sum(cell.elapsed_s for cell in cells) / 60:.0f}"
