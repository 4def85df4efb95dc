"""The report's pictures, made from the results file alone.

Colour tells the score, line style the allocation over layers: the same in every picture.
"""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.report_text import KEPT_PICTURE, LAYERS_PICTURE, PICTURES
from trt_kv.calibration.evaluation import FULL, VARIANTS, Variant
from trt_kv.calibration.evaluation_results import Results, Row, TaskResults
from trt_kv.calibration.evaluation_statistics import Estimate
from trt_kv.require import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#22262b"
FAINT = "#8a9199"
COLORS = {"mass": "#c2410c", "window": "#1d4ed8", "random": "#8a9199", "recency": "#15803d"}
STYLES = {"recipe": "-", "uniform": (0, (5, 2)), "online": (0, (1, 1.5))}
MARKERS = {"recipe": "o", "uniform": "s", "online": "x"}
PROTECTED_COLOR = "#d9a406"
DODGE = 0.005


def pictures(results: Results) -> dict[str, bytes]:
    """PNGs by file name. ``MissingDependencyError`` without matplotlib."""
    made = {PICTURES[task.name]: _png(_task_figure(results, task), results) for task in results.tasks}
    made[LAYERS_PICTURE] = _png(_layers_figure(results), results)
    made[KEPT_PICTURE] = _png(_kept_figure(results), results)
    return made


def _task_figure(results: Results, task: TaskResults) -> "Figure":
    """Quality against the kept share, a line per variant: exact answers where the task asks, and perplexity."""
    figure, axes = _figure(14.3, 4.6, 2)
    if task.asks:
        _draw_quality(axes[0], results, task, lambda row: row.accuracy)
        axes[0].set_ylim(-0.03, 1.05)
        _percent_axis(axes[0].yaxis)
        _title(axes[0], "Exact answers")
        _draw_quality(axes[1], results, task, task.perplexity)
        _title(axes[1], "Perplexity of the right answer")
    else:
        _draw_quality(axes[0], results, task, task.perplexity)
        _title(axes[0], "Perplexity of the text")
        full = task.row(FULL.name, 1.0)
        _draw_quality(axes[1], results, task, lambda row: task.perplexity_ratio(row, full))
        _title(axes[1], "Perplexity over that of the full cache, same documents")
    for axis in axes[int(task.asks) :]:
        _log_axis(axis)
    _legend(figure, axes[0])
    title = f"{task.title}, {len(task.documents)} documents: {task.description}"
    figure.suptitle(title, color=INK, fontsize=11, x=0.01, ha="left")
    return figure


def _draw_quality(axis: "Axes", results: Results, task: TaskResults, measure: Callable[[Row], Estimate]) -> None:
    full = measure(task.row(FULL.name, 1.0))
    axis.axhspan(full.low, full.high, color=INK, alpha=0.08, linewidth=0)
    axis.axhline(full.value, color=INK, linewidth=1.2, label=FULL.label)
    for index, variant in enumerate(VARIANTS):
        estimates = [measure(task.row(variant.name, budget)) for budget in results.settings.budgets]
        shares = np.array(results.settings.budgets) + DODGE * (index - (len(VARIANTS) - 1) / 2)
        axis.vlines(
            shares, [e.low for e in estimates], [e.high for e in estimates], color=_color(variant), alpha=0.35, linewidth=1.4
        )
        _line(axis, variant, shares, [estimate.value for estimate in estimates])
    _share_axis(axis, results)


def _layers_figure(results: Results) -> "Figure":
    """Kept share of each layer at each budget, one map per score, and the largest over the smallest share."""
    figure, axes = _figure(14.5, 4.6, 3)
    budgets = results.settings.budgets
    for axis, score in zip(axes, ("mass", "window"), strict=False):
        recipes = [next(r for r in results.recipes if (r.score, r.budget) == (score, budget)) for budget in budgets]
        shares_LB = np.array([recipe.kept for recipe in recipes]).T
        axis.imshow(shares_LB, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
        for (layer, column), share in np.ndenumerate(shares_LB):
            axis.text(
                column, layer, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color="white" if share < 0.6 else INK
            )
        axis.set_xticks(range(len(budgets)), [f"{100 * budget:.0f}" for budget in budgets])
        axis.set_yticks(range(results.model.n_layers))
        axis.set_xlabel("mean kept share, %", color=INK)
        axis.set_ylabel("layer", color=INK)
        _title(axis, f"Kept share of each layer, %: {score} score")
        axes[2].plot(budgets, [recipe.spread for recipe in recipes], "o-", color=COLORS[score], label=f"{score} score")
    axes[2].axhline(1.0, color=FAINT, linewidth=1.0)
    axes[2].set_yscale("log")
    _plain_log_ticks(axes[2], (1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100))
    _share_axis(axes[2], results)
    axes[2].legend(frameon=False, fontsize=9)
    _title(axes[2], "Largest kept share over smallest")
    return figure


def _kept_figure(results: Results) -> "Figure":
    """What is kept of late questions: where the tokens stand, and how much of the fact and of the question they are."""
    task = results.tasks[0]
    panels: tuple[tuple[str, Callable[[Row], float | None]], ...] = (
        ("Mean place of the kept tokens (0: first, 100: last)", lambda row: row.kept_place),
        ("Kept of the asked fact, mean over layers", lambda row: row.fact_kept),
        ("Kept of the question, mean over layers", lambda row: row.question_kept),
    )
    figure, axes = _figure(17.0, 4.6, len(panels))
    shown = [variant for variant in VARIANTS if variant.allocation != "online"]
    for axis, (title, measure) in zip(axes, panels, strict=True):
        for variant in shown:
            values = [measure(task.row(variant.name, budget)) for budget in results.settings.budgets]
            _line(axis, variant, results.settings.budgets, [np.nan if value is None else value for value in values])
        _share_axis(axis, results)
        axis.set_ylim(-0.03, 1.05)
        _percent_axis(axis.yaxis)
        _title(axis, title)
    for axis in axes[1:]:
        axis.plot((0, 1), (0, 1), color=FAINT, linewidth=0.8, zorder=0)
    _legend(figure, axes[0])
    figure.suptitle(
        f"{task.title}: what is kept (thin line: the share that is kept of all tokens)",
        color=INK,
        fontsize=11,
        x=0.01,
        ha="left",
    )
    return figure


def _line(axis: "Axes", variant: Variant, shares: "Sequence[float] | np.ndarray", values: Sequence[float]) -> None:
    axis.plot(
        shares,
        values,
        color=_color(variant),
        linestyle=STYLES[variant.allocation],
        marker=MARKERS[variant.allocation],
        markersize=4.5,
        linewidth=1.6,
        label=variant.label,
    )


def _color(variant: Variant) -> str:
    return COLORS[variant.score] if variant.recent == 1 else PROTECTED_COLOR


def _figure(width: float, height: float, n_panels: int) -> "tuple[Figure, list[Axes]]":
    """A figure on the Agg canvas with panels side by side: no display, no global pyplot state."""
    figure: Figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    axes = list(figure.subplots(1, n_panels, squeeze=False)[0])
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=9)
    return figure, axes


def _title(axis: "Axes", title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)


def _legend(figure: "Figure", axis: "Axes") -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9)


def _share_axis(axis: "Axes", results: Results) -> None:
    axis.set_xticks(results.settings.budgets)
    axis.set_xlim(min(results.settings.budgets) - 0.04, max(results.settings.budgets) + 0.04)
    _percent_axis(axis.xaxis)
    axis.set_xlabel("mean kept share", color=INK)
    axis.grid(color=FAINT, alpha=0.25, linewidth=0.6)


def _percent_axis(axis: "object") -> None:
    axis.set_major_formatter(lambda share, _position: f"{100 * share:.0f} %")  # type: ignore[attr-defined]


def _log_axis(axis: "Axes") -> None:
    """A logarithmic axis with ticks at round numbers, as fine as its range needs."""
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    ticks: Sequence[float] = (1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50)
    if high / low < 1.5:
        step = 0.1 if high - low > 0.2 else 0.02
        ticks = (np.arange(round(low / step), high / step) * step).tolist()
    _plain_log_ticks(axis, [tick for tick in ticks if low <= tick <= high])


def _plain_log_ticks(axis: "Axes", ticks: "Sequence[float] | np.ndarray") -> None:
    low, high = axis.get_ylim()
    axis.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.yaxis.set_minor_locator(require("matplotlib.ticker").NullLocator())
    axis.set_ylim(low, high)


def _png(figure: "Figure", results: Results) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120, metadata={"Software": f"trt-kv {results.versions.trt_kv}"})
    return png.getvalue()
