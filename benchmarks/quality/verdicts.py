"""Markdown tables of which policy is better where, and where there is no clear difference."""

from collections.abc import Iterable, Mapping, Sequence

from benchmarks.quality.cell import Cell
from benchmarks.quality.comparisons import (
    Compare,
    Comparison,
    against,
    best_rival,
    by_answers,
    by_loss,
    compare_of,
    lossless_share,
    percent,
    rivals_of_ours,
    signs,
    verdicts,
)
from benchmarks.quality.results import Results
from benchmarks.quality.tables import quality, table
from trt_kv.calibration.statistics import FEWEST_DOCUMENTS, Verdict


def best_table(results: Results) -> str:
    """The policy that is best at each kept share, per task."""
    policies = [policy for policy in results.in_groups("ours", "published") if not policy.adaptive]
    rows = []
    for name, cell in results.main_cells():
        best = [best_rival(cell, policies, budget) for budget in results.settings.budgets]
        told = ["" if row is None else f"`{row.policy}` {quality(results, cell, row)}" for row in best]
        rows.append([name, *told, quality(results, cell, cell.full)])
    return table(["kept, %", *map(percent, results.settings.budgets), "full cache"], rows)


def rival_table(results: Results) -> str:
    """Ours against their rivals, one sign per kept share."""
    columns = verdict_columns(results, results.main_cells())
    rows = []
    for policy in results.in_groups("ours"):
        for name, rival_of in rivals_of_ours(results).items():
            found = [against(cell, policy.name, rival_of, compare) for _, cell, compare in columns]
            if any(found):
                rows.append([policy.label, name, *map(sign_cell, found)])
    return table(["policy", "against", *[name for name, _, _ in columns]], rows)


def weak_table(results: Results) -> str:
    """The kept shares at which ours are clearly worse than a rival, in any context."""
    contexts = [plan.context_length for plan in results.settings.contexts]
    rows = []
    for policy in results.in_groups("ours"):
        for name, rival_of in rivals_of_ours(results).items():
            for task in results.tasks:
                cells = [results.cell(task.name, context) for context in contexts]
                found = [against(cell, policy.name, rival_of, compare_of(results, cell)) for cell in cells]
                worse = [[budget for budget, verdict in of.items() if verdict == "worse"] for of in found]
                if any(worse):
                    rows.append([policy.label, name, task.title, *[", ".join(map(percent, budgets)) for budgets in worse]])
    return table(["policy", "worse than", "task", *map(str, contexts)], rows)


def lossless_table(results: Results) -> str:
    """The kept share from which on a policy shows no clear loss against the full cache; empty if there is none."""
    cells = [(name, cell) for name, cell in results.main_cells() if len(cell.documents) >= FEWEST_DOCUMENTS]
    rows = []
    for policy in results.in_groups("ours", "published"):
        if not policy.adaptive:
            shares = [
                lossless_share(cell, policy.name, results.settings.budgets, compare_of(results, cell)) for _, cell in cells
            ]
            rows.append([policy.label, *["" if found is None else percent(found) for found in shares]])
    return table(["policy", *[name for name, _ in cells]], rows)


def verdict_columns(results: Results, cells: Iterable[tuple[str, Cell]]) -> list[tuple[str, Cell, Compare]]:
    """Columns of verdict tables for each named cell: exact answers if the task has right ones, and perplexity."""
    return [
        (f"{name}: {what}", cell, compare)
        for name, cell in cells
        for what, compare in (("exact", by_answers), ("perplexity", by_loss))
        if results.asks(cell) or what == "perplexity"
    ]


def choice_table(
    results: Results, cells: Iterable[tuple[str, Cell]], budgets: Sequence[float], comparisons: Iterable[Comparison]
) -> str:
    """One sign for each choice alone, per kept share at which both policies were measured."""
    columns = verdict_columns(results, cells)
    rows = []
    for comparison in comparisons:
        found = [verdicts(cell, comparison.policy, comparison.other, budgets, compare) for _, cell, compare in columns]
        if any(found):
            shares = next(of_cell for of_cell in found if of_cell)
            rows.append([comparison.choice, ", ".join(map(percent, shares)), *map(sign_cell, found)])
    return table(["choice", "kept, %", *[name for name, _, _ in columns]], rows)


def sign_cell(found: Mapping[float, Verdict]) -> str:
    """The signs of verdicts as code, so that Markdown does not interpret them."""
    return f"`{signs(found)}`" if found else ""
