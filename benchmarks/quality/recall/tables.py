"""Tables about host-resident policies, as Markdown, made from the results alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.quality import tables
from benchmarks.quality.cell import Cell
from benchmarks.quality.comparisons import Comparison, by_answers, by_loss, percent, signs, verdicts
from benchmarks.quality.recall.results import HostCell, MovedRow, RecallResults, beside, late_cell
from benchmarks.quality.results import PolicyFacts, Results
from trt_kv.policy import Policy

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
    Comparison(choice="layers: pooledwindow's recipe instead of uniform", policy="freekv-windowrecipe", other=FREEKV),
    Comparison(choice="ArkVale's ranking, still with speculation", policy="freekv-arkvale", other=FREEKV),
    Comparison(choice="ArkVale with speculation instead of waiting", policy="freekv-arkvale", other="arkvale"),
    Comparison(
        choice="ArkVale's ranking: pooledwindow's recipe instead of uniform",
        policy="freekv-arkvale-windowrecipe",
        other="freekv-arkvale",
    ),
    Comparison(choice="layer 0 exempt, FreeKV (attends to more)", policy="freekv-exempt", other=FREEKV),
    Comparison(choice="layer 0 exempt, Quest (attends to more)", policy="quest-exempt", other="quest"),
    Comparison(choice="layer 0 exempt, ArkVale (attends to more)", policy="arkvale-exempt", other="arkvale"),
)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One kind of task at one context and page size: the host-resident policies alone, and among all others."""

    name: str
    host: HostCell
    all: Cell
    asks: bool

    def kib(self, pages: float) -> float:
        """KiB of so many pages of a KV head."""
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


def quality_table(recall: RecallResults, results: Results, cell: Measured) -> str:
    """Exact answers (else perplexity) of every policy at every share that the host-resident ones were measured at."""
    policies = [*_here(recall, cell.host, *SHOWN), *results.in_groups("ours", "published")]
    return tables.budget_table(results, cell.all, policies, lambda row: tables.quality(results, cell.all, row))


def loss_table(recall: RecallResults, results: Results, cell: Measured) -> str:
    """Perplexity of the right answer, of the same rows."""
    policies = [*_here(recall, cell.host, *SHOWN), *results.in_groups("ours", "published")]
    return tables.budget_table(results, cell.all, policies, lambda row: tables.ratio(cell.all.perplexity(row)))


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
    """What tau does to quality, corrections and traffic at one share."""
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


def traffic_table(recall: RecallResults, cell: Measured, budgets: Sequence[float]) -> str:
    """What each policy moves at each share, per step and over all layers, and what one step attends to."""
    rows = []
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
    """How alike queries of neighbouring steps are, and how often each KV head of each layer is corrected, for each tau at which
    some are and some are not."""
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


def choice_table(cells: Sequence[Measured], budgets: Sequence[float]) -> str:
    """One sign per share for each choice alone, where both were measured."""
    columns = [
        (f"{cell.name}: {what}", cell, compare)
        for cell in cells
        for what, compare in (("exact", by_answers), ("perplexity", by_loss))
        if cell.asks or what == "perplexity"
    ]
    rows = []
    for comparison in COMPARISONS:
        found = [verdicts(cell.all, comparison.policy, comparison.other, budgets, compare) for _, cell, compare in columns]
        if any(found):
            shares = next(of_cell for of_cell in found if of_cell)
            told = [f"`{signs(of_cell)}`" if of_cell else "" for of_cell in found]
            rows.append([comparison.choice, ", ".join(map(percent, shares)), *told])
    return tables.table(["choice", "shares, %", *[name for name, _, _ in columns]], rows)


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
    """Late questions at every context and page size, beside the best policies that drop tokens."""
    places = list(dict.fromkeys((plan.context_length, plan.page_size) for plan in recall.plans))
    cells = {place: late_cell(recall, results, *place) for place in places}
    shown = {place: cell for place, cell in cells.items() if cell is not None and cell.has(FREEKV, budget)}
    policies = [*recall.in_groups("host"), *results.in_groups("ours", "published")]
    joined = {place: beside(results, cell) for place, cell in shown.items()}
    rows = []
    for policy in policies:
        told = []
        for cell in joined.values():
            row = cell.row(policy.name, budget)
            own = policy.adaptive or row.mean_kept > budget + tables.MORE_THAN_ROUNDING
            told.append(tables.share(row.accuracy) + (f" at {percent(row.mean_kept)} %" if own else ""))
        rows.append([policy.label, *told])
    full = ["full cache", *[tables.share(cell.full.accuracy) for cell in joined.values()]]
    counts = ["documents", *[str(len(cell.documents)) for cell in joined.values()]]
    return tables.table(["context (page), tokens", *[f"{n} ({page})" for n, page in joined]], [full, *rows, counts])
