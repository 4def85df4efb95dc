"""Pictures of the kept tokens: share per layer, and place in the prompt."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.quality.cell import Cell, Row
from benchmarks.quality.plots.style import (
    FAINT,
    INK,
    accuracy_axis,
    headline,
    heatmap,
    legend,
    panels,
    share_axis,
    shown_policies,
    style_of,
    title,
)
from benchmarks.quality.results import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def layers(results: Results) -> "Figure":
    """Kept share of each layer: policies with different shares per layer, and those with adaptive budgets."""
    cells = results.main_cells()
    budget = results.settings.summary_budget
    rows: list[tuple[str, Row]] = []
    for policy in results.in_groups("published", "ours"):
        first, *others = cells
        if policy.adaptive:
            rows += [(f"{policy.label}: {name}", cell.row(policy.name)) for name, cell in (first, *others)]
        elif len(set(first[1].row(policy.name, budget).kept_by_layer)) > 1:
            rows.append((f"{policy.label}, {100 * budget:.0f} % kept", first[1].row(policy.name, budget)))
    values = np.array([row.kept_by_layer for _, row in rows])
    figure, (axis,) = panels(1, columns=1, width=9.5, height=0.36 * len(rows) + 1.0)
    texts = [[f"{100 * value:.0f}" for value in row] for row in values]
    heatmap(axis, values, texts, [name for name, _ in rows], [str(layer) for layer in range(results.model.n_layers)])
    axis.set_xlabel("layer", color=INK, fontsize=9)
    headline(figure, f"Kept share of each layer, %, mean over documents of {results.settings.main_context} tokens")
    return figure


def kept(results: Results) -> "Figure":
    """Tokens kept of late questions: mean place in the prompt, and shares of the fact and of the question."""
    cell = results.late()
    measures: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
        ("Mean place of the kept tokens (0: first, 100: last)", "place in the prompt", lambda row: row.kept_place),
        ("Kept of the asked fact", "kept share of its tokens", lambda row: row.fact_kept),
        ("Kept of the question", "kept share of its tokens", lambda row: row.question_kept),
    )
    figure, axes = panels(len(measures), columns=len(measures), width=4.8, height=4.0)
    for axis, (name, unit, measure) in zip(axes, measures, strict=True):
        for policy in shown_policies(results) if cell else ():
            assert cell is not None
            style = style_of(policy)
            rows = rows_of(results, cell, policy.name, adaptive=policy.adaptive)
            values = [measure(row) for row in rows]
            axis.plot(
                [row.mean_kept for row in rows],
                [np.nan if value is None else value for value in values],
                color=style.color,
                marker=style.marker,
                linestyle="" if policy.adaptive else style.dash,
                linewidth=style.width,
                markersize=12 if policy.adaptive else 4.5,
                label=policy.label,
            )
        shares = np.linspace(min(results.settings.budgets), 1.0, 50)
        share_axis(axis, results.settings.budgets)
        if measure is not measures[0][2]:
            axis.plot(shares, shares, color=FAINT, linewidth=0.8, zorder=0)
        accuracy_axis(axis, unit)
        title(axis, name)
    legend(figure, axes)
    headline(figure, "Late questions: what is kept, mean over layers and KV heads (thin line: as much as of all tokens)")
    return figure


def rows_of(results: Results, cell: Cell, policy: str, *, adaptive: bool) -> list[Row]:
    """The rows of a policy in order of the kept share."""
    if adaptive:
        return [cell.row(policy)]
    return [cell.row(policy, budget) for budget in results.settings.at(cell.context_length).budgets]
