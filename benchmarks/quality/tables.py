"""The report's tables, as Markdown, made from the results alone."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from benchmarks.quality.cell import Cell, Row
from benchmarks.quality.comparisons import COMPARISONS, by_answers, by_loss, percent, row_at_most, signs, verdicts
from benchmarks.quality.plots.adaptive import sweep
from benchmarks.quality.results import PolicyFacts, Results
from trt_kv.calibration.statistics import Estimate, wilson_interval

MORE_THAN_ROUNDING = 0.005
"""By how much a kept share may be above the one asked for without a word."""


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
    """Exact answers in % where the task asks, else perplexity; with its interval."""
    asks = cell.task == "late" or results.task(cell.task).asks
    return share(row.accuracy) if asks else ratio(cell.perplexity(row))


def capability_table(results: Results) -> str:
    """What the full cache does, per task and context."""
    contexts = [plan.context_length for plan in results.settings.contexts]

    def told(cell: Cell) -> str:
        value = quality(results, cell, cell.full)
        return value if results.can(cell) else f"*{value}*"

    rows = [[task.title, *[told(results.cell(task.name, context)) for context in contexts]] for task in results.tasks]
    counts = [["documents", *[str(len(results.cell(results.tasks[0].name, context).documents)) for context in contexts]]]
    return table(["context, tokens", *map(str, contexts)], [*rows, *counts])


def budget_table(results: Results, cell: Cell, policies: Sequence[PolicyFacts], value: Callable[[Row], str]) -> str:
    """A value per policy and kept share; policies that find their own budget have a column of their own."""
    budgets = [budget for budget in results.settings.at(cell.context_length).budgets if cell.has(policies[0].name, budget)]
    rows = []
    for policy in policies:
        if policy.adaptive:
            row = cell.row(policy.name)
            told = f"{value(row)} at {percent(row.mean_kept)} %"
            rows.append([policy.label, *[""] * len(budgets), told])
        else:
            rows.append([policy.label, *[_with_share(cell.row(policy.name, budget), value) for budget in budgets], ""])
    full = f"Full cache: {value(cell.full)}."
    return f"{table(['kept, %', *map(percent, budgets), 'own budget'], rows)}\n\n{full}"


def _with_share(row: Row, value: Callable[[Row], str]) -> str:
    """A row's value, and what it keeps where that is not its budget: protected tokens can be more."""
    assert row.budget is not None
    return value(row) + (f" at {percent(row.mean_kept)} %" if row.mean_kept > row.budget + MORE_THAN_ROUNDING else "")


def context_table(results: Results, budget: float) -> str:
    """Late questions of every context at one kept share."""
    contexts = [plan.context_length for plan in results.settings.contexts]
    cells = {context: results.late(context) for context in contexts}

    def told(cell: Cell | None, policy: PolicyFacts) -> str:
        if cell is None or not cell.has(policy.name, budget):
            return ""
        row = cell.row(policy.name, budget)
        own = policy.adaptive or row.mean_kept > budget + MORE_THAN_ROUNDING
        return share(row.accuracy) + (f" at {percent(row.mean_kept)} %" if own else "")

    policies = results.in_groups("reference", "published", "ours")
    rows = [
        [policy.label, *[told(cell, policy) if policy.group != "reference" else _full(cell) for cell in cells.values()]]
        for policy in policies
    ]
    counts = ["documents", *["" if cell is None else str(len(cell.documents)) for cell in cells.values()]]
    return table(["context, tokens", *map(str, contexts)], [*rows, counts])


def _full(cell: Cell | None) -> str:
    return "" if cell is None else share(cell.full.accuracy)


def own_budget_table(results: Results, policy: PolicyFacts) -> str:
    """What a policy that finds its own budget keeps per task, how it answers, and what others do with no more."""
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
    """A row's quality without its interval, and its kept share where the table does not say it."""
    value = percent(row.accuracy.value) if results.task(cell.task).asks else f"{cell.perplexity(row).value:.2f}"
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
    """ReFreeKV with one part replaced each."""
    policies = [results.policy("refreekv"), *results.in_groups("ablation")]
    cells = results.compared()
    rows = []
    for policy in policies:
        label = "as published" if policy is policies[0] else policy.label
        told = []
        for cell in cells:
            row = cell.row(policy.name)
            told.append(f"{quality(results, cell, row)} at {percent(row.mean_kept)} %")
        rows.append([label, *told])
    return table(["", *[results.task(cell.task).title for cell in cells]], rows)


def sink_table(results: Results) -> str:
    """The last query's attention on the first four tokens, per layer."""
    rows = [[results.task(cell.task).title, *[f"{100 * mass:.1f}" for mass in cell.sink_mass]] for cell in results.compared()]
    return table(["layer", *map(str, range(results.model.n_layers))], rows)


def choice_table(results: Results) -> str:
    """One sign per kept share for each choice alone."""
    late = results.late()
    cells = [("Late questions", late)] if late else []
    cells += [(results.task(cell.task).title, cell) for cell in results.compared() if not results.task(cell.task).late]
    columns = []
    for name, cell in cells:
        if cell.task == "late" or results.task(cell.task).asks:
            columns.append((f"{name}: exact", cell, by_answers))
        columns.append((f"{name}: perplexity", cell, by_loss))
    budgets = results.settings.budgets
    rows = []
    for comparison in COMPARISONS:
        found = [verdicts(cell, comparison.policy, comparison.other, budgets, compare) for _, cell, compare in columns]
        rows.append([comparison.choice, *[f"`{signs(verdicts_by_budget)}`" for verdicts_by_budget in found]])
    return table(["choice", *[name for name, _, _ in columns]], rows)


def seed_table(results: Results, budget: float) -> str:
    """Late questions, each seed's documents by themselves."""
    cell = results.late()
    seeds = results.settings.seeds
    rows = []
    for policy in results.in_groups("published", "ours") if cell else ():
        assert cell is not None
        row = cell.row(policy.name, budget)
        told = [policy.label]
        for seed in seeds:
            members = [document.seed == seed for document in cell.documents]
            answers = [right for right, member in zip(row.answers, members, strict=True) if member]
            told.append(share(wilson_interval(sum(answers), len(answers))))
        rows.append([*told, share(row.accuracy)])
    return table(["", *[f"seed {seed}" for seed in seeds], "all"], rows)


def recipe_table(results: Results) -> str:
    """How unequal the recipes are: largest over smallest kept share of a layer."""
    budgets = results.settings.budgets
    scores = list(dict.fromkeys(recipe.score for recipe in results.recipes))
    by_name = {(recipe.score, recipe.budget): recipe for recipe in results.recipes}
    rows = [[score, *[f"{by_name[score, budget].spread:.1f}" for budget in budgets]] for score in scores]
    return table(["kept, %", *map(percent, budgets)], rows)


def memory_table(results: Results) -> str:
    """KiB of the pages that one sequence holds after a prompt."""
    cell = results.compared()[0]
    budgets = results.settings.budgets

    def kib(row: Row) -> str:
        return f"{row.kv_bytes / 1024:.0f}"

    rows = [
        [policy.label, *[kib(cell.row(policy.name, budget)) for budget in budgets], ""]
        if not policy.adaptive
        else [policy.label, *[""] * len(budgets), kib(cell.row(policy.name))]
        for policy in results.in_groups("published", "ours")
    ]
    return table(["kept, %", *map(percent, budgets), "own budget"], rows) + f"\n\nFull cache: {kib(cell.full)}."


def policy_table(results: Results) -> str:
    """Every policy of the main results with its settings."""
    return policy_rows(results.policies)


def policy_rows(policies: Iterable[PolicyFacts]) -> str:
    """A table of policies with their settings."""
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
