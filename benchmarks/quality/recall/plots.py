"""Pictures of host-resident policies: quality against the attended share, and the effect of the correction threshold."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quality.cell import Row
from benchmarks.quality.plots.style import (
    FAINT,
    INK,
    Style,
    accuracy_axis,
    curve,
    headline,
    legend,
    log_axis,
    panels,
    png,
    share_axis,
    style_of,
    title,
)
from benchmarks.quality.recall.results import RecallResults, beside
from benchmarks.quality.recall.tables import Measured, measured_cells, sweep
from benchmarks.quality.results import PolicyFacts, Results
from trt_kv.calibration.statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[[RecallResults, Results], "Figure"]
Measure = Callable[[Row], Estimate]
SHOWN = ("prefixkv", "freekv", "arkvale", "freekv-arkvale-windowrecipe")
"""Policies in pictures, with the full cache at most five series; the tables have all."""
HOST_STYLES = {
    "freekv": Style(color="#dc2626", marker="o", width=2.6),
    "arkvale": Style(color="#7c3aed", marker="^"),
    "freekv-arkvale-windowrecipe": Style(color="#0e7490", marker="P", width=2.4),
}


def recall_pictures(recall: RecallResults, results: Results) -> dict[str, bytes]:
    """PNGs by file name."""
    return {name: png(draw(recall, results), results) for name, draw in RECALL_PICTURES.items()}


def accuracy(recall: RecallResults, results: Results) -> "Figure":
    """Exact answers (plain text: perplexity) against the share, a panel per task, with policies that drop tokens."""
    cells = [*measured_cells(recall, results), *_many(recall, results)]
    drawn: list[tuple[Measured, str, Measure, bool]] = [
        (cell, f"{cell.name.capitalize()}: exact answers", lambda row: row.accuracy, True) for cell in cells if cell.asks
    ]
    drawn += [
        (cell, f"{cell.name.capitalize()}: perplexity over full cache's", _ratio_to_full(cell), False)
        for cell in cells
        if not cell.asks or cell.name == "long copy"
    ]
    figure, axes = panels(len(drawn), columns=3, width=4.7, height=3.8)
    for axis, (cell, name, measure, is_share) in zip(axes, drawn, strict=True):
        _draw_shares(axis, recall, results, cell, measure)
        if is_share:
            accuracy_axis(axis)
        else:
            log_axis(axis, "perplexity / full cache's")
        title(axis, name)
    legend(figure, axes)
    headline(
        figure,
        f"Quality against the share of tokens that a step attends to (all on the host) or that is kept (drops);"
        f" {recall.main.context_length} tokens, pages of {recall.main.page_size}, 95 % intervals",
    )
    return figure


def _many(recall: RecallResults, results: Results) -> list[Measured]:
    """The task with many facts alone."""
    cell = recall.cell("many")
    found = [cell] if cell is not None and results.can(results.cell("many", cell.context_length)) else []
    return [Measured(name="many facts", host=of, all=beside(results, of), asks=True) for of in found]


def _ratio_to_full(cell: Measured) -> Measure:
    return lambda row: cell.all.perplexity_ratio(row, cell.all.full)


def _draw_shares(axis: "Axes", recall: RecallResults, results: Results, cell: Measured, measure: Measure) -> None:
    full = measure(cell.all.full)
    axis.axhspan(full.low, full.high, color=INK, alpha=0.08, linewidth=0)
    axis.axhline(full.value, color=INK, linewidth=1.0, label="full cache")
    for policy in results.in_groups("published", "ours"):
        if policy.name in SHOWN:
            style = style_of(policy)
            faint = Style(color=style.color, marker=".", dash=(0, (2, 1.5)), width=1.1)
            _line(axis, recall, cell, policy, faint, measure, f"{policy.label} (drops)")
    for policy in recall.in_groups("host", "mixture", "combined"):
        if policy.name in SHOWN:
            _line(axis, recall, cell, policy, HOST_STYLES[policy.name], measure, policy.label)
    share_axis(axis, recall.main.budgets)
    axis.set_xlabel("share attended to, or kept", color=INK, fontsize=9)


def _line(
    axis: "Axes",
    recall: RecallResults,
    cell: Measured,
    policy: PolicyFacts,
    style: Style,
    measure: Measure,
    label: str,
) -> None:
    rows = [cell.all.row(policy.name, budget) for budget in recall.main.budgets if cell.all.has(policy.name, budget)]
    curve(axis, [row.mean_kept for row in rows], [measure(row) for row in rows], style, label, alpha=0.2)


def tau(recall: RecallResults, results: Results) -> "Figure":
    """Quality, corrections and traffic of FreeKV against tau."""
    budgets, swept = recall.main.sweep_budgets, sweep(recall)
    cells = [cell for cell in measured_cells(recall, results) if cell.host.has(swept[1][1].name, budgets[0])]
    figure, axes = panels(4, columns=4, width=4.4, height=3.9)
    colors = ("#dc2626", "#1d4ed8", "#15803d", "#b8860b")
    for cell, color in zip(cells, colors, strict=False):
        for budget in budgets:
            rows = [cell.all.row(policy.name, budget) for _, policy in swept]
            dash: Any = "-" if budget == max(budgets) else (0, (3, 2))
            label = f"{cell.name}, {100 * budget:.0f} % attended"
            if cell.asks:
                _series(axes[0], [row.accuracy for row in rows], color, dash, label)
            _series(axes[1], [cell.all.perplexity_ratio(row, cell.all.full) for row in rows], color, dash, label)
        moved = [cell.host.moved_by(policy.name, recall.swept_budget) for _, policy in swept]
        _series(axes[2], [of.mean("corrected_layer_steps") for of in moved], color, (0, (1, 1.2)), "_")
        _series(axes[2], [of.mean("corrected_heads") for of in moved], color, "-", f"{cell.name} (dotted: layer-steps)")
    accuracy_axis(axes[0])
    log_axis(axes[1], "perplexity / full cache's")
    accuracy_axis(axes[2], "share of KV heads")
    axes[3].set_ylabel("KiB per step", color=INK, fontsize=9)
    _draw_traffic(axes[3], recall, cells[0])
    names = ("Exact answers", "Perplexity over full cache's", "KV heads corrected", f"KiB per step, {cells[0].name}")
    for axis, name in zip(axes, names, strict=True):
        axis.set_xticks(range(len(swept)), [_tau_name(value) for value, _ in swept])
        axis.set_xlabel("tau", color=INK, fontsize=9)
        axis.grid(color=FAINT, alpha=0.25, linewidth=0.6)
        title(axis, name)
    legend(figure, axes)
    headline(
        figure,
        f"FreeKV's threshold of correction, {recall.main.context_length} tokens; corrections and traffic at"
        f" {100 * recall.swept_budget:.0f} % attended",
    )
    return figure


def _tau_name(value: float) -> str:
    return "never" if value < -1.0 else "always" if value > 1.0 else f"{value:g}"


def _series(axis: "Axes", estimates: Sequence[Estimate], color: str, dash: Any, label: str) -> None:
    places = np.arange(len(estimates))
    axis.fill_between(places, [e.low for e in estimates], [e.high for e in estimates], color=color, alpha=0.08, linewidth=0)
    axis.plot(places, [e.value for e in estimates], "o", linestyle=dash, color=color, markersize=4, label=label)


def _draw_traffic(axis: "Axes", recall: RecallResults, cell: Measured) -> None:
    moved = [cell.host.moved_by(policy.name, recall.swept_budget) for _, policy in sweep(recall)]
    ahead, late = (np.array([cell.kib(float(np.mean(getattr(of, field)))) for of in moved]) for field in ("ahead", "late"))
    places = np.arange(len(moved))
    axis.bar(places, ahead, color="#93c5fd", label="recalled ahead")
    axis.bar(places, late, bottom=ahead, color="#dc2626", label="waited for")


def corrected(recall: RecallResults, results: Results) -> "Figure":
    """Correction rate of each KV head of each layer, at each tau between the extremes."""
    budget, between = recall.swept_budget, [(value, policy) for value, policy in sweep(recall) if -1.0 <= value <= 1.0]
    cell = next(of for of in measured_cells(recall, results) if of.host.has(between[0][1].name, budget))
    figure, axes = panels(len(between), columns=len(between), width=2.4, height=3.4)
    for axis, (value, policy) in zip(axes, between, strict=True):
        shares_LK = np.array(cell.host.moved_by(policy.name, budget).corrected_LK)
        axis.imshow(shares_LK, cmap="magma_r", vmin=0.0, vmax=1.0, aspect="auto")
        for (layer, head), share in np.ndenumerate(shares_LK):
            color = "white" if share > 0.45 else INK
            axis.text(head, layer, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
        axis.set_xticks(range(shares_LK.shape[1]))
        axis.set_yticks(range(len(shares_LK)))
        axis.set_xlabel("KV head", color=INK, fontsize=9)
        title(axis, f"tau {value:g}")
    axes[0].set_ylabel("layer", color=INK, fontsize=9)
    headline(figure, f"Steps in which a KV head is corrected, %; {cell.name}, {100 * budget:.0f} % attended")
    return figure


RECALL_PICTURES: dict[str, Draw] = {
    "recall_accuracy.png": accuracy,
    "recall_tau.png": tau,
    "recall_corrected.png": corrected,
}
"""The function that draws each picture, by file name."""
