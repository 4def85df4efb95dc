"""Pictures of adaptive budgets: their distribution, the effect of the threshold, ablations."""

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.quality.cell import Cell, Row
from benchmarks.quality.comparisons import REFREEKV
from benchmarks.quality.plots.style import (
    FAINT,
    INK,
    accuracy_axis,
    headline,
    heatmap,
    legend,
    panels,
    percents,
    title,
)
from benchmarks.quality.results import PolicyFacts, Results
from trt_kv.require import require

if TYPE_CHECKING:
    from collections.abc import Callable

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def budgets(results: Results) -> "Figure":
    """The budget of each input, per task and context; if layers are exempt, also without these."""
    adaptive = [policy for policy in results.in_groups("published", "ours") if policy.adaptive]
    counted = [(policy, without) for policy in adaptive for without in ((False, True) if policy.exempt_layers else (False,))]
    figure, axes = panels(len(counted), columns=len(counted), width=5.0, height=0.62 * len(results.tasks) + 1.0)
    for axis, (policy, without) in zip(axes, counted, strict=True):
        _draw_budgets(axis, results, policy, without=without)
        told = ", without exempt layers" if without else ", all layers" if policy.exempt_layers else ""
        title(axis, f"{policy.label}{told}")
    for axis in axes[1:]:
        axis.set_yticklabels([])
    legend(figure, axes)
    headline(figure, "Budget that each input gets: a dot per document, a bar at the median of each context")
    return figure


def _draw_budgets(axis: "Axes", results: Results, policy: PolicyFacts, *, without: bool) -> None:
    lengths = [plan.context_length for plan in results.settings.contexts]
    colormap = require("matplotlib").colormaps["viridis"]
    for number, length in enumerate(lengths):
        color = colormap(0.05 + 0.85 * number / max(1, len(lengths) - 1))
        for place, task in enumerate(results.tasks):
            cell = results.cell(task.name, length)
            if not cell.is_compared:
                continue
            row = cell.row(policy.name)
            shares = row.kept_without(policy.exempt_layers) if without else row.kept
            height = place + 0.7 * ((number + 0.5) / len(lengths) - 0.5)
            axis.plot(shares, [height] * len(shares), ".", color=color, markersize=4, alpha=0.5, label=f"{length} tokens")
            axis.plot(np.median(shares), height, "|", color=INK, markersize=10, markeredgewidth=1.8)
    axis.set_yticks(range(len(results.tasks)), [task.title for task in results.tasks])
    axis.set_ylim(len(results.tasks) - 0.5, -0.5)
    axis.set_xlim(0.0, 1.0)
    percents(axis.xaxis)
    axis.set_xlabel("kept share", color=INK, fontsize=9)
    axis.grid(axis="x", color=FAINT, alpha=0.25, linewidth=0.6)


def thresholds(results: Results) -> "Figure":
    """Kept share and answer quality of ReFreeKV against its threshold, a panel per task."""
    swept = sweep(results)
    cells = results.compared()
    figure, axes = panels(len(cells), columns=4)
    places = [threshold for threshold, _ in swept]
    for axis, cell in zip(axes, cells, strict=True):
        rows = [cell.row(policy.name) for _, policy in swept]
        lines = [("kept share, all layers", "#1d4ed8", [row.kept_interval for row in rows])]
        lines += [("exact answers", "#c2410c", [row.accuracy for row in rows])] if results.task(cell.task).asks else []
        for label, color, estimates in lines:
            axis.fill_between(
                places, [e.low for e in estimates], [e.high for e in estimates], color=color, alpha=0.08, linewidth=0
            )
            axis.plot(places, [e.value for e in estimates], "o-", color=color, markersize=4.5, label=label)
        axis.set_xscale("log")
        axis.set_xticks(places, [f"{100 * threshold:g} %" for threshold in places])
        axis.minorticks_off()
        axis.set_xlabel("threshold T: share of the norm lost", color=INK, fontsize=9)
        axis.axvline(_own_threshold(results), color=FAINT, linewidth=0.8, linestyle="--", zorder=0)
        accuracy_axis(axis, "share")
        axis.grid(color=FAINT, alpha=0.25, linewidth=0.6)
        title(axis, results.task(cell.task).title)
    legend(figure, axes)
    headline(figure, f"ReFreeKV against its threshold (dashed: as published), {results.settings.main_context} tokens")
    return figure


def sweep(results: Results) -> list[tuple[float, PolicyFacts]]:
    """ReFreeKV at every threshold, smallest first."""
    policies = [results.policy(REFREEKV), *results.in_groups("threshold")]
    return sorted(((policy.threshold or 0.0, policy) for policy in policies), key=lambda pair: pair[0])


def _own_threshold(results: Results) -> float:
    return results.policy(REFREEKV).threshold or 0.0


def ablations(results: Results) -> "Figure":
    """Ablations of ReFreeKV, each with one part replaced: exact answers and kept shares, per task."""
    policies = [results.policy(REFREEKV), *results.in_groups("ablation")]
    cells = results.compared()
    figure, axes = panels(2, columns=2, width=7.0, height=0.55 * len(policies) + 1.6)
    labels = ["as published", *[policy.label for policy in policies[1:]]]

    def draw(axis: "Axes", names: list[str], columns: list[Cell], value: "Callable[[Row], float]") -> None:
        of = [[value(cell.row(policy.name)) for cell in columns] for policy in policies]
        titles = [results.task(cell.task).title.replace(" ", "\n", 1) for cell in columns]
        heatmap(axis, np.array(of), [[f"{100 * share:.0f}" for share in row] for row in of], names, titles)

    draw(axes[0], labels, [cell for cell in cells if results.task(cell.task).asks], lambda row: row.accuracy.value)
    draw(axes[1], [""] * len(labels), cells, lambda row: row.mean_kept)
    title(axes[0], "Exact answers, %")
    title(axes[1], "Kept of all layers, %")
    headline(figure, f"Parts of ReFreeKV, {results.settings.main_context} tokens")
    return figure
