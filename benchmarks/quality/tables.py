"""The report's tables, as Markdown, made from the results alone."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from benchmarks.quality.cell import Cell, Row
from benchmarks.quality.comparisons import REFREEKV, percent, row_at_most
from benchmarks.quality.plots.adaptive import sweep
from benchmarks.quality.results import PolicyFacts, Results
from benchmarks.quality.settings import Settings
from trt_kv.calibration.statistics import Estimate, wilson_interval

MORE_THAN_ROUNDING = 0.005
"""Excess over the requested kept share up to which tables do not mention it."""


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def share(estimate: Estimate) -> str:
    """E.g. "75 (69–80)", in %."""
    return f"{percent(estimate.value)} ({percent(estimate.low)}–{percent(estimate.high)})"


def ratio(estimate: Estimate) -> str:
    """E.g. "1.48 (1.20–2.32)"; large numbers without decimals."""
    digits = 2 if estimate.high < 100 else 0
    return f"{estimate.value:.{digits}f} ({estimate.low:.{digits}f}–{estimate.high:.{digits}f})"


def quality(results: Results, cell: Cell, row: Row) -> str:
    """Exact answers in % if the task has right answers, else perplexity; with its interval."""
    return share(row.accuracy) if results.asks(cell) else ratio(cell.perplexity(row))


def summary_rows(results: Results) -> list[list[str]]:
    """Every policy on the main cells at one kept share, or at its adaptive budget."""
    cells = [cell for _, cell in results.main_cells()]
    rows = [["`full`", *[quality(results, cell, cell.full) for cell in cells]]]
    for policy in results.in_groups("ours", "published"):
        found = [(cell, cell.row(policy.name, results.settings.summary_budget)) for cell in cells]
        name = f"`{policy.name}`" + (" (ours)" if policy.group == "ours" else "") + (", own budget" if policy.adaptive else "")
        rows.append([name, *[with_share(row, quality(results, cell, row)) for cell, row in found]])
    return rows


def capability_table(results: Results) -> str:
    """Quality of the full cache, per task and context."""
    contexts = [plan.context_length for plan in results.settings.contexts]

    def told(cell: Cell) -> str:
        value = quality(results, cell, cell.full)
        return value if results.can(cell) else f"*{value}*"

    rows = [[task.title, *[told(results.cell(task.name, context)) for context in contexts]] for task in results.tasks]
    counts = [["documents", *[str(len(results.cell(results.tasks[0].name, context).documents)) for context in contexts]]]
    return table(["context, tokens", *map(str, contexts)], [*rows, *counts])


def budget_table(results: Results, cell: Cell, policies: Sequence[PolicyFacts], value: Callable[[Row], str]) -> str:
    """A value per policy and kept share; policies with an adaptive budget have a separate column."""
    known = results.settings.at(cell.context_length).budgets
    budgets = [budget for budget in known if all(cell.has(policy.name, budget) for policy in policies)]

    def told(policy: PolicyFacts, budget: float | None) -> str:
        row = cell.row(policy.name, budget)
        return with_share(row, value(row))

    rows = []
    for policy in policies:
        shown = [""] * len(budgets) if policy.adaptive else [told(policy, budget) for budget in budgets]
        rows.append([policy.label, *shown, told(policy, None) if policy.adaptive else ""])
    full = f"Full cache: {value(cell.full)}."
    return f"{table(['kept, %', *map(percent, budgets), 'own budget'], rows)}\n\n{full}"


def with_share(row: Row, told: str) -> str:
    """``told`` of a row, and its kept share if its budget is adaptive or exceeded because of protected tokens."""
    own = row.budget is None or row.mean_kept > row.budget + MORE_THAN_ROUNDING
    return told + (f" at {percent(row.mean_kept)} %" if own else "")


def context_table(policies: Iterable[PolicyFacts], cells: Mapping[str, Cell | None], budget: float) -> str:
    """Exact answers at one kept share, a column per cell that has right answers."""

    def told(cell: Cell | None, policy: PolicyFacts) -> str:
        if cell is None or not cell.has(policy.name, budget):
            return ""
        row = cell.row(policy.name, budget)
        return with_share(row, share(row.accuracy))

    rows = [[policy.label, *[told(cell, policy) for cell in cells.values()]] for policy in policies]
    full = ["full cache", *["" if cell is None else share(cell.full.accuracy) for cell in cells.values()]]
    counts = ["documents", *["" if cell is None else str(len(cell.documents)) for cell in cells.values()]]
    return table(["context, tokens", *cells], [full, *rows, counts])


def own_budget_table(results: Results, policy: PolicyFacts) -> str:
    """Kept share and quality of a policy with an adaptive budget per task, and quality of others that keep no more."""
    rivals = [other for other in results.in_groups("published", "ours") if not other.adaptive]
    header = [
        "task",
        "kept, %",
        "from–to",
        *(["without exempt layers"] if policy.exempt_layers else []),
        "quality",
        "full cache",
    ]
    rows = []
    for cell in results.compared():
        row = cell.row(policy.name)
        without = [percent(float(np.mean(row.kept_without(policy.exempt_layers))))] if policy.exempt_layers else []
        others = [row_at_most(results, cell, rival.name, row.mean_kept) for rival in rivals]
        rows.append(
            [
                results.task(cell.task).title,
                percent(row.mean_kept),
                f"{percent(min(row.kept))}–{percent(max(row.kept))}",
                *without,
                quality(results, cell, row),
                quality(results, cell, cell.full),
                *["" if other is None else _brief(results, cell, other) for other in others],
            ]
        )
    return table([*header, *[rival.label for rival in rivals]], rows)


def _brief(results: Results, cell: Cell, row: Row) -> str:
    """A row's quality without its interval, and its kept share."""
    value = percent(row.accuracy.value) if results.asks(cell) else f"{cell.perplexity(row).value:.2f}"
    return f"{value} at {percent(row.budget or row.mean_kept)} %"


def threshold_table(results: Results) -> str:
    """ReFreeKV's kept share and quality at every threshold."""
    swept = sweep(results)
    rows = []
    for cell in results.compared():
        of_task = [cell.row(policy.name) for _, policy in swept]
        title = results.task(cell.task).title
        rows.append([f"{title}: kept", *[percent(row.mean_kept) for row in of_task]])
        rows.append([f"{title}: quality", *[quality(results, cell, row) for row in of_task]])
    return table(["threshold", *[f"{100 * threshold:g} %" for threshold, _ in swept]], rows)


def ablation_table(results: Results) -> str:
    """Ablations of ReFreeKV, each with one part replaced."""
    policies = [results.policy(REFREEKV), *results.in_groups("ablation")]
    cells = results.compared()
    rows = []
    for policy in policies:
        found = [(cell, cell.row(policy.name)) for cell in cells]
        label = "as published" if policy is policies[0] else policy.label
        rows.append([label, *[with_share(row, quality(results, cell, row)) for cell, row in found]])
    return table(["", *[results.task(cell.task).title for cell in cells]], rows)


def sink_table(results: Results) -> str:
    """The last query's attention on the first four tokens, per layer."""
    rows = [[results.task(cell.task).title, *[f"{100 * mass:.1f}" for mass in cell.sink_mass]] for cell in results.compared()]
    return table(["layer", *map(str, range(results.model.n_layers))], rows)


def kept_table(results: Results) -> str:
    """Tokens kept of late questions at about half: mean place in the prompt, shares of the fact and of the question."""
    cell = results.late()
    budget = min(results.settings.budgets, key=lambda budget: abs(budget - 0.5))
    rows = []
    for policy in results.in_groups("published", "ours") if cell else ():
        assert cell is not None
        row = cell.row(policy.name, budget)
        kept = (row.mean_kept, row.kept_place, row.fact_kept, row.question_kept)
        rows.append([policy.label, *["" if value is None else percent(value) for value in kept]])
    return table(["policy", "kept, %", "mean place (0 first, 100 last)", "of the asked fact, %", "of the question, %"], rows)


def seed_table(results: Results) -> str:
    """Late questions, separately for each seed's documents."""
    cell = results.late()
    seeds = results.settings.seeds
    rows = []
    for policy in results.in_groups("published", "ours") if cell else ():
        assert cell is not None
        row = cell.row(policy.name, results.settings.summary_budget)
        told = [policy.label]
        for seed in seeds:
            answers = [right for right, document in zip(row.answers, cell.documents, strict=True) if document.seed == seed]
            told.append(share(wilson_interval(sum(answers), len(answers))))
        rows.append([*told, share(row.accuracy)])
    return table(["", *[f"seed {seed}" for seed in seeds], "all"], rows)


def recipe_table(results: Results) -> str:
    """Spread of the recipes: largest over smallest kept share of a layer."""
    budgets = results.settings.budgets
    scores = list(dict.fromkeys(recipe.score for recipe in results.recipes))
    by_name = {(recipe.score, recipe.budget): recipe for recipe in results.recipes}
    rows = [[score, *[f"{by_name[score, budget].spread:.1f}" for budget in budgets]] for score in scores]
    return table(["kept, %", *map(percent, budgets)], rows)


def memory_table(results: Results) -> str:
    """KiB of the pages that one sequence holds after a prompt."""
    policies = results.in_groups("published", "ours")
    return budget_table(results, results.compared()[0], policies, lambda row: f"{row.kv_bytes / 1024:.0f}")


def document_table(settings: Settings) -> str:
    """Number of documents of each task at a context, and the kept shares measured there."""
    rows = [
        [str(plan.context_length), str(len(settings.seeds) * plan.documents_per_seed), ", ".join(map(percent, plan.budgets))]
        for plan in settings.contexts
    ]
    return table(["context, tokens", "documents per task", "kept, %"], rows)


def policy_table(policies: Iterable[PolicyFacts]) -> str:
    """Policies with their settings."""
    rows = [
        [
            f"`{policy.name}`",
            policy.label if policy.label != policy.name else "",
            policy.group,
            f"`{policy.settings}`" if policy.settings else "",
            policy.recipe,
        ]
        for policy in policies
    ]
    return table(["name", "what", "group", "settings that are not defaults", "recipe found with"], rows)
