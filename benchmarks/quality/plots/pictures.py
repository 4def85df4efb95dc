"""The report's pictures of quality: against the kept share, against the context, and of the full cache alone."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.quality.cell import Cell, Row
from benchmarks.quality.plots import adaptive
from benchmarks.quality.plots import kept as kept_plots
from benchmarks.quality.plots.style import (
    INK,
    accuracy_axis,
    curve,
    headline,
    heatmap,
    legend,
    log_axis,
    panels,
    percents,
    png,
    share_axis,
    shown_policies,
    style_of,
    title,
)
from benchmarks.quality.results import PolicyFacts, Results
from trt_kv.calibration.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Measure = Callable[[Cell, Row], Estimate]

PICTURES: dict[str, Callable[[Results], "Figure"]] = {}
"""The function that draws each picture, by file name."""


def pictures(results: Results) -> dict[str, bytes]:
    """PNGs by file name. ``MissingDependencyError`` without matplotlib."""
    return {name: png(draw(results), results) for name, draw in PICTURES.items()}


def capability(results: Results) -> "Figure":
    """Answers of the full cache, per task and context."""
    asking = [task for task in results.tasks if task.asks]
    contexts = [plan.context_length for plan in results.settings.contexts]
    figure, (axis,) = panels(1, columns=1, width=2.2 + 1.2 * len(contexts), height=0.55 * len(asking) + 1.2)
    cells = [[results.cell(task.name, context) for context in contexts] for task in asking]
    values = np.array([[cell.full.accuracy.value for cell in row] for row in cells])
    texts = [[_capability_text(results, cell) for cell in row] for row in cells]
    heatmap(axis, values, texts, [task.title for task in asking], [str(context) for context in contexts])
    axis.set_xlabel("context, tokens", color=INK, fontsize=9)
    needed = results.settings.capable_from
    headline(
        figure, f"Exact answers of the full cache, % of n documents (in brackets: under {100 * needed:.0f} %, not compared)"
    )
    return figure


def _capability_text(results: Results, cell: Cell) -> str:
    told = f"{100 * cell.full.accuracy.value:.0f} (n = {len(cell.documents)})"
    return told if results.can(cell) else f"[{told}]"


def accuracy(results: Results) -> "Figure":
    """Exact answers against the kept share, a panel per task."""
    cells = results.compared(asking=True)
    figure, axes = panels(len(cells), columns=4)
    for axis, cell in zip(axes, cells, strict=True):
        _draw_quality(axis, results, cell, lambda _, row: row.accuracy)
        accuracy_axis(axis)
        title(axis, results.task(cell.task).title)
    legend(figure, axes)
    headline(figure, _headline(results, "Exact answers against the kept share"))
    return figure


def perplexity(results: Results) -> "Figure":
    """Perplexity of the right answer against the kept share, a panel per task."""
    cells = results.compared()
    figure, axes = panels(len(cells), columns=4)
    for axis, cell in zip(axes, cells, strict=True):
        _draw_quality(axis, results, cell, lambda cell, row: cell.perplexity_ratio(row, cell.full))
        log_axis(axis, "perplexity / full cache's")
        title(axis, results.task(cell.task).title)
    legend(figure, axes)
    headline(figure, _headline(results, "Perplexity of the right answer over that of the full cache, same documents"))
    return figure


def agreement(results: Results) -> "Figure":
    """Greedy tokens equal to those of the full cache, against the kept share, a panel per task."""
    cells = results.compared()
    figure, axes = panels(len(cells), columns=4)
    for axis, cell in zip(axes, cells, strict=True):
        _draw_quality(axis, results, cell, lambda cell, row: cell.agreement(row))
        percents(axis.yaxis)
        axis.set_ylim(top=1.03)
        axis.set_ylabel("equal tokens", color=INK, fontsize=9)
        title(axis, results.task(cell.task).title)
    legend(figure, axes)
    headline(figure, _headline(results, "Greedy tokens that are those of the full cache, given the right tokens before"))
    return figure


def contexts(results: Results) -> "Figure":
    """Exact answers against the context at one kept share, a panel per task; only where the full cache can do the task."""
    lengths = [plan.context_length for plan in results.settings.contexts]
    budget = results.settings.summary_budget
    tasks = [task for task in results.tasks if task.asks]
    figure, axes = panels(len(tasks), columns=4)
    policies = shown_policies(results)
    for axis, task in zip(axes, tasks, strict=True):
        cells = [cell for length in lengths if results.can(cell := results.cell(task.name, length))]
        for number, policy in enumerate(policies):
            estimates = [cell.row(policy.name, budget).accuracy for cell in cells]
            places = np.array([cell.context_length for cell in cells]) * 1.012 ** (number - len(policies) / 2)
            label = policy.label + (" (own budget)" if policy.adaptive else "")
            curve(axis, places, estimates, style_of(policy), label)
        axis.set_xscale("log", base=2)
        axis.set_xticks(lengths, [str(length) for length in lengths])
        axis.minorticks_off()
        axis.set_xlim(0.8 * min(lengths), 1.25 * max(lengths))
        axis.set_xlabel("context, tokens", color=INK, fontsize=9)
        accuracy_axis(axis)
        title(axis, task.title)
    legend(figure, axes)
    headline(figure, f"Exact answers at {100 * budget:.0f} % kept against the context, where the full cache can do the task")
    return figure


def _draw_quality(axis: "Axes", results: Results, cell: Cell, measure: Measure) -> None:
    """Lines for policies with a kept share; for adaptive budgets a point with their range."""
    budgets = results.settings.at(cell.context_length).budgets
    full = measure(cell, cell.full)
    axis.axhspan(full.low, full.high, color=INK, alpha=0.08, linewidth=0)
    axis.axhline(full.value, color=INK, linewidth=1.0, label="full cache")
    policies = [policy for policy in shown_policies(results) if cell.has(policy.name, budgets[0])]
    fixed = [policy for policy in policies if not policy.adaptive]
    for number, policy in enumerate(fixed):
        rows = [cell.row(policy.name, budget) for budget in budgets]
        shares = np.array([row.mean_kept for row in rows]) * 1.012 ** (number - len(fixed) / 2)
        curve(axis, shares, [measure(cell, row) for row in rows], style_of(policy), policy.label)
    for policy in policies:
        if policy.adaptive:
            _draw_point(axis, policy, cell.row(policy.name), measure(cell, cell.row(policy.name)))
    share_axis(axis, budgets)


def _draw_point(axis: "Axes", policy: PolicyFacts, row: Row, estimate: Estimate) -> None:
    style = style_of(policy)
    axis.hlines(estimate.value, min(row.kept), max(row.kept), color=style.color, linewidth=2.2, alpha=0.6, zorder=5)
    axis.vlines(row.mean_kept, estimate.low, estimate.high, color=style.color, linewidth=1.2, alpha=0.6, zorder=5)
    axis.plot(
        row.mean_kept,
        estimate.value,
        color=style.color,
        marker=style.marker,
        markersize=16 if style.marker == "*" else 10,
        markeredgecolor="white",
        linestyle="",
        zorder=6,
        label=f"{policy.label} (its budgets: mean, range)",
    )


def _headline(results: Results, what: str) -> str:
    return (
        f"{what}; {results.settings.main_context} tokens, {_documents(results.compared())} documents per task, 95 % intervals"
    )


def _documents(cells: Sequence[Cell]) -> str:
    counts = sorted({len(cell.documents) for cell in cells})
    return "–".join(map(str, counts))


PICTURES |= {
    "capability.png": capability,
    "accuracy.png": accuracy,
    "perplexity.png": perplexity,
    "agreement.png": agreement,
    "contexts.png": contexts,
    "budgets.png": adaptive.budgets,
    "thresholds.png": adaptive.thresholds,
    "ablations.png": adaptive.ablations,
    "layers.png": kept_plots.layers,
    "kept.png": kept_plots.kept,
}
