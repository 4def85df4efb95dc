"""Markdown tables about host-resident policies, made from the results alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.quality import tables
from benchmarks.quality.cell import Cell, Row
from benchmarks.quality.comparisons import Comparison, Rival, against, best_published, percent
from benchmarks.quality.recall.results import HostCell, MovedRow, RecallResults, beside, late_cell
from benchmarks.quality.results import PolicyFacts, Results
from benchmarks.quality.verdicts import sign_cell, verdict_columns
from trt_kv.policy import Policy

IN_SUMMARY = {
    "freekv": "`freekv`",
    "quest": "`quest`",
    "arkvale": "`arkvale`",
    "freekv-unimetric": "`freekv` with `budget=unimetric`, own budget",
}
SHOWN = ("host", "mixture", "combined")
"""The groups that have a row in every table."""
FREEKV, UNCORRECTED, SYNCHRONOUS = "freekv", "freekv-uncorrected", "freekv-synchronous"
COMPARISONS = (
    Comparison(choice="correction at tau 0.8 instead of none", policy=FREEKV, other=UNCORRECTED),
    Comparison(choice="speculation and correction instead of waiting in every step", policy=FREEKV, other=SYNCHRONOUS),
    Comparison(choice="FreeKV instead of Quest", policy=FREEKV, other="quest"),
    Comparison(choice="FreeKV instead of ArkVale", policy=FREEKV, other="arkvale"),
    Comparison(choice="pooling: largest softmax of a group instead of the mean", policy="freekv-max-softmax", other=FREEKV),
    Comparison(choice="pooling: mean of the bounds as they are", policy="freekv-mean-raw", other=FREEKV),
    Comparison(choice="pooling: largest bound", policy="freekv-max-raw", other=FREEKV),
    Comparison(choice="softmax over bounds / sqrt(head size)", policy="freekv-scaled", other=FREEKV),
    Comparison(choice="summary: mean deviation instead of smallest and largest", policy="freekv-deviation", other=FREEKV),
    Comparison(choice="layers: PrefixKV's recipe instead of uniform", policy="freekv-recipe", other=FREEKV),
    Comparison(choice="layers: prefixkv's recipe instead of uniform", policy="freekv-windowrecipe", other=FREEKV),
    Comparison(choice="ArkVale's ranking, still with speculation", policy="freekv-arkvale", other=FREEKV),
    Comparison(choice="ArkVale with speculation instead of waiting", policy="freekv-arkvale", other="arkvale"),
    Comparison(
        choice="ArkVale's ranking: prefixkv's recipe instead of uniform",
        policy="freekv-arkvale-windowrecipe",
        other="freekv-arkvale",
    ),
    Comparison(choice="ArkVale's ranking and prefixkv's recipe", policy="freekv-arkvale-windowrecipe", other=FREEKV),
    Comparison(choice="layer 0 exempt, FreeKV (attends to more)", policy="freekv-exempt", other=FREEKV),
    Comparison(choice="layer 0 exempt, Quest (attends to more)", policy="quest-exempt", other="quest"),
    Comparison(choice="layer 0 exempt, ArkVale (attends to more)", policy="arkvale-exempt", other="arkvale"),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One kind of task at one context and page size: the host-resident policies alone, and with all others."""

    name: str
    host: HostCell
    all: Cell
    asks: bool

    def kib(self, pages: float) -> float:
        """KiB of a number of pages of one KV head."""
        return pages * self.host.page_head_bytes / 1024


def measured_cells(recall: RecallResults, results: Results, context_length: int = 0, page_size: int = 0) -> list[Measured]:
    """Late questions together, then every other task; by default at the main context and page size."""
    context_length = context_length or recall.main.context_length
    page_size = page_size or recall.main.page_size
    late = late_cell(recall, results, context_length, page_size)
    found = [Measured(name="late questions", host=late, all=beside(results, late), asks=True)] if late else []
    for task in results.tasks:
        if task.late or (cell := recall.cell(task.name, context_length, page_size)) is None:
            continue
        if results.can(results.cell(task.name, context_length)):
            found.append(Measured(name=task.title.lower(), host=cell, all=beside(results, cell), asks=task.asks))
    return found


def quality_table(recall: RecallResults, results: Results, cell: Measured, value: Callable[[Row], str]) -> str:
    """A value of every policy at every share at which the host-resident ones were measured."""
    policies = [*_here(recall, cell.host, *SHOWN), *results.in_groups("ours", "published")]
    return tables.budget_table(results, cell.all, policies, value)


def _here(recall: RecallResults, cell: HostCell, *groups: str) -> list[PolicyFacts]:
    """The policies of some groups that a cell has rows of."""
    measured = {row.policy for row in cell.rows}
    return [policy for policy in recall.in_groups(*groups) if policy.name in measured]


def sweep(recall: RecallResults) -> list[tuple[float, PolicyFacts]]:
    """FreeKV at every tau, smallest first."""
    policies = [recall.policy(name) for name in (FREEKV, UNCORRECTED, SYNCHRONOUS)] + recall.in_groups("tau")
    return sorted(((tau_of(policy), policy) for policy in policies), key=lambda pair: pair[0])


def tau_of(policy: PolicyFacts) -> float:
    """A policy's tau, as its settings say."""
    given = [part.removeprefix("tau=") for part in policy.settings.split() if part.startswith("tau=")]
    return float(given[0]) if given else Policy.tau


def tau_table(recall: RecallResults, cell: Measured, budget: float) -> str:
    """Quality, corrections and traffic by tau at one share."""
    header = [
        "tau",
        "exact answers, %",
        "perplexity",
        "KV heads corrected, %",
        "layer-steps with a correction, %",
        "KiB ahead",
        "KiB waited for",
        "same pages as before, %",
    ]
    rows = []
    for tau, policy in sweep(recall):
        row, moved = cell.all.row(policy.name, budget), cell.host.moved_by(policy.name, budget)
        rows.append(
            [
                f"{tau:g}",
                tables.share(row.accuracy),
                tables.ratio(cell.all.perplexity(row)),
                tables.share(moved.mean("corrected_heads")),
                tables.share(moved.mean("corrected_layer_steps")),
                *kib_of(cell, moved),
                percent(float(np.mean(moved.overlap))) if moved.overlap else "",
            ]
        )
    return tables.table(header, rows)


def kib_of(cell: Measured, moved: MovedRow) -> list[str]:
    """KiB per step, ahead and late."""
    return [f"{cell.kib(float(np.mean(pages))):.1f}" for pages in (moved.ahead, moved.late)]


def traffic_table(recall: RecallResults, cell: Measured) -> str:
    """Traffic of each policy at each share, per step and over all layers, and the size of what one step attends to."""
    budgets, rows = recall.main.budgets, []
    for policy in _here(recall, cell.host, *SHOWN):
        own = [""] * len(budgets)
        if policy.adaptive:
            rows.append([policy.label, *own, _traffic(cell, policy.name, None)])
        else:
            rows.append([policy.label, *[_traffic(cell, policy.name, budget) for budget in budgets], ""])
    return tables.table(["attended, %", *map(percent, budgets), "own budget"], rows)


def _traffic(cell: Measured, policy: str, budget: float | None) -> str:
    row, moved = cell.host.row(policy, budget), cell.host.moved_by(policy, budget)
    ahead, late = kib_of(cell, moved)
    return f"{ahead} + {late} of {row.kv_bytes / 1024:.0f}"


def heads_table(recall: RecallResults, cell: Measured, budget: float) -> str:
    """Cosine of queries of adjacent steps, and correction rate of each KV head of each layer, for each tau at which some are
    corrected and some are not."""
    between = [(tau, policy) for tau, policy in sweep(recall) if -1.0 <= tau <= 1.0]
    corrected = [np.array(cell.host.moved_by(policy.name, budget).corrected_LK) for _, policy in between]
    n_layers, n_heads = corrected[0].shape
    cosine_LK = cell.host.moved_by(FREEKV, budget).cosine_LK
    header = ["layer", *[f"cosine, head {head}" for head in range(n_heads)]]
    header += [f"tau {tau:g}, head {head}" for tau, _ in between for head in range(n_heads)]
    rows = [
        [str(layer), *[f"{cosine:.2f}" for cosine in cosine_LK[layer]], *[percent(x) for of in corrected for x in of[layer]]]
        for layer in range(n_layers)
    ]
    return tables.table(header, rows)


def rival_table(recall: RecallResults, results: Results, cells: Sequence[Measured]) -> str:
    """Every policy against the best published one that drops tokens, and against each of ours at the same share."""
    columns = verdict_columns(results, [(cell.name, cell.all) for cell in cells])
    rivals = {"best published": best_published(results)}
    rivals |= {policy.label: _at_same_share(policy) for policy in results.in_groups("ours") if not policy.adaptive}
    rows = []
    for policy in recall.in_groups(*SHOWN):
        for name, rival_of in rivals.items():
            told = [sign_cell(against(cell, policy.name, rival_of, compare)) for _, cell, compare in columns]
            if any(told):
                rows.append([policy.label, name, *told])
    return tables.table(["policy", "against", *[name for name, _, _ in columns]], rows)


def _at_same_share(policy: PolicyFacts) -> Rival:
    return lambda cell, row: None if row.budget is None else cell.row(policy.name, row.budget)


def page_table(recall: RecallResults, results: Results, budget: float) -> str:
    """Quality and traffic by page size at the main context."""
    context = recall.main.context_length
    sizes = sorted({plan.page_size for plan in recall.plans if plan.context_length == context})
    rows = []
    for policy in recall.in_groups("host"):
        for size in sizes:
            told = [policy.label, str(size)]
            for cell in _with_pages(recall, results, context, sizes):
                found = next(of for of in measured_cells(recall, results, context, size) if of.name == cell)
                if not found.host.has(policy.name, budget):
                    break
                row, moved = found.all.row(policy.name, budget), found.host.moved_by(policy.name, budget)
                ahead, late = kib_of(found, moved)
                told += [percent(row.mean_kept), tables.share(row.accuracy), tables.ratio(found.all.perplexity(row))]
                told += [f"{ahead} + {late}"]
            else:
                rows.append(told)
    columns = [
        f"{name}: {what}"
        for name in _with_pages(recall, results, context, sizes)
        for what in ("attended, %", "exact, %", "perplexity", "KiB per step")
    ]
    return tables.table(["policy", "page", *columns], rows)


def _with_pages(recall: RecallResults, results: Results, context: int, sizes: Sequence[int]) -> list[str]:
    """The tasks that were measured at every page size."""
    names = [[cell.name for cell in measured_cells(recall, results, context, size)] for size in sizes]
    return [name for name in names[0] if all(name in of_size for of_size in names)]


def context_table(recall: RecallResults, results: Results, budget: float) -> str:
    """Late questions at every context and page size, with the policies that drop tokens."""
    places = list(dict.fromkeys((plan.context_length, plan.page_size) for plan in recall.plans))
    found = {place: late_cell(recall, results, *place) for place in places}
    cells = {
        f"{n_tokens} (pages of {page})": beside(results, cell)
        for (n_tokens, page), cell in found.items()
        if cell is not None and cell.has(FREEKV, budget)
    }
    return tables.context_table([*recall.in_groups("host"), *results.in_groups("ours", "published")], cells, budget)


def summary_rows(recall: RecallResults, results: Results) -> list[list[str]]:
    """Some policies on the main cells of the main results; empty cells were not measured."""
    cells = {cell.name: cell.all for cell in measured_cells(recall, results)}
    rows = []
    for name, told in IN_SUMMARY.items():
        values = []
        for task, _ in results.main_cells():
            cell, budget = cells.get(task), results.settings.summary_budget
            row = cell.row(name, budget) if cell and cell.has(name, budget) else None
            values.append(tables.with_share(row, tables.quality(results, cell, row)) if cell and row else "")
        rows.append([f"{told} (all on the host)", *values])
    return rows


def document_table(recall: RecallResults, results: Results) -> str:
    """Number of documents of each task at a context and page size."""
    tasks: dict[tuple[int, int, int], dict[str, None]] = {}
    for cell in recall.cells:
        place = (cell.context_length, cell.page_size, len(cell.documents))
        tasks.setdefault(place, {})[results.task(cell.task).title] = None
    rows = [[*map(str, place), ", ".join(titles)] for place, titles in tasks.items()]
    return tables.table(["context, tokens", "page, tokens", "documents per task", "tasks"], rows)
