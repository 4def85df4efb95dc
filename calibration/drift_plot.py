"""The plot of drift thresholds: similarity of adjacent queries and of their pages, and correction rates."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_kv.calibration.figure import new_figure
from trt_kv.calibration.recipe_plot import ACCENT, FAINT, INK, add_depth_bar, depth_colors, percent
from trt_kv.drift import Drift
from trt_kv.errors import TrtKvError
from trt_kv.json_file import write_atomically
from trt_kv.require import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEADS_WIDTH = 0.7
"""Width of the marks of a layer's KV heads, as a share of the distance between two layers."""


def picture_from_drift(drift: Drift, path: Path) -> None:
    """Write a PNG of ``drift`` to ``path``, whole or not at all.

    Above: the cosines of adjacent queries per layer and KV head (median, middle half, middle 90 %) with each layer's
    threshold; each layer's correction rate against tau, a dot at its threshold. Below: the share of pages that adjacent
    queries both choose, per layer and KV head; corrected share per layer, of KV heads and of steps. Layers are coloured by
    depth. ``MissingDependencyError`` without matplotlib.
    """
    png = io.BytesIO()
    _figure(drift).savefig(png, format="png", dpi=150, metadata={"Software": drift.created_by})
    write_atomically(path, png.getvalue(), kind="picture of the drift thresholds", error=TrtKvError)


def _figure(drift: Drift) -> "Figure":
    figure = new_figure(11.0, 8.0)
    depths = depth_colors(drift.model.n_layers)
    colors = [depths[layer.layer] for layer in drift.layers]
    axes = figure.subplots(2, 2)
    _draw_similarity(axes[0, 0], drift, colors)
    _draw_rates(axes[0, 1], drift, colors)
    add_depth_bar(figure, axes[0, 1], depths)
    _draw_overlap(axes[1, 0], drift, colors)
    _draw_corrections(axes[1, 1], drift, colors)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=9)
        axis.grid(axis="y", color=FAINT, alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
    for axis in (axes[0, 0], axes[1, 0], axes[1, 1]):
        axis.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(nbins=12, integer=True))
        axis.set_xlim(-0.7, drift.model.n_layers - 0.3)
        axis.set_xlabel("layer", color=INK)
    told = f"{drift.n_steps} steps after {len(drift.calibration.samples)} prompts"
    figure.suptitle(
        f"{drift.model.name}: drift of queries, {percent(drift.correction_rate)} of KV heads corrected ({told})",
        color=INK,
        fontsize=12,
    )
    return figure


def _draw_similarity(axis: "Axes", drift: Drift, colors: list[Any]) -> None:
    lowest = 1.0
    for layer, color in zip(drift.layers, colors, strict=True):
        for x, head in zip(_places(layer.layer, len(layer.heads)), layer.heads, strict=True):
            low, lower, median, upper, high = np.interp((0.05, 0.25, 0.5, 0.75, 0.95), drift.shares, head.cosine)
            width = _HEADS_WIDTH * 90 / drift.model.n_layers / len(layer.heads)
            axis.vlines(x, low, high, color=color, linewidth=min(1.2, width))
            axis.vlines(x, lower, upper, color=color, linewidth=min(5.0, 3 * width))
            axis.plot(x, median, "o", color="white", markeredgecolor=color, markersize=min(4.5, 4 * width), zorder=4)
            lowest = min(lowest, low)
        lowest = min(lowest, layer.tau)
    _mark_taus(axis, drift)
    # Room below for the legend.
    axis.set_ylim(lowest - 0.18 * (1.03 - lowest), 1.03)
    axis.set_title("Cosine of adjacent queries, per layer and KV head", loc="left", fontsize=10, color=INK)
    axis.set_ylabel("median, middle half, middle 90 %", color=INK)
    axis.legend(frameon=False, fontsize=9, loc="lower right")


def _mark_taus(axis: "Axes", drift: Drift) -> None:
    layers = np.array([layer.layer for layer in drift.layers])
    taus = [layer.tau for layer in drift.layers]
    axis.hlines(taus, layers - 0.45, layers + 0.45, color=ACCENT, linewidth=1.6, label="the layer's tau", zorder=5)


def _draw_rates(axis: "Axes", drift: Drift, colors: list[Any]) -> None:
    few = len(drift.layers) <= 16
    for layer, color in zip(drift.layers, colors, strict=True):
        axis.plot(layer.cosine, drift.shares, color=color, linewidth=1.6 if few else 0.9)
        axis.plot(layer.tau, layer.rate, "o", color=color, markersize=6 if few else 3, markeredgecolor="white", zorder=4)
    label = f"target: {percent(drift.correction_rate)}"
    axis.axhline(drift.correction_rate, color=ACCENT, linewidth=1.4, linestyle="--", label=label)
    lowest = min(min(layer.tau, float(np.interp(0.02, drift.shares, layer.cosine))) for layer in drift.layers)
    axis.set_xlim(max(-1.05, lowest - 0.05), 1.02)
    axis.set_ylim(0.0, 1.02)
    axis.yaxis.set_major_formatter(lambda share, _position: percent(share))
    axis.set_title("Corrected KV heads of each layer, as a function of tau", loc="left", fontsize=10, color=INK)
    axis.set_xlabel("tau", color=INK)
    axis.set_ylabel("corrected KV heads", color=INK)
    axis.legend(frameon=False, fontsize=9, loc="upper left")


def _draw_overlap(axis: "Axes", drift: Drift, colors: list[Any]) -> None:
    shown = [(layer, color) for layer, color in zip(drift.layers, colors, strict=True) if layer.overlap is not None]
    for layer, color in shown:
        axis.bar(layer.layer, layer.overlap or 0.0, width=0.8, color=color, alpha=0.55)
        for x, head in zip(_places(layer.layer, len(layer.heads)), layer.heads, strict=True):
            if head.overlap is not None:
                axis.plot(x, head.overlap, "o", color=color, markersize=min(5.0, 60 / drift.model.n_layers), zorder=4)
    if not shown:
        said = "no overlap: every page was attended to\n(calibrate with longer prompts)"
        axis.text(0.5, 0.5, said, transform=axis.transAxes, ha="center", va="center", color=FAINT)
    axis.set_ylim(0.0, 1.02)
    axis.yaxis.set_major_formatter(lambda share, _position: percent(share))
    axis.set_title("Chosen pages that the previous query chooses too", loc="left", fontsize=10, color=INK)
    axis.set_ylabel("mean over steps; dots: KV heads", color=INK)


def _draw_corrections(axis: "Axes", drift: Drift, colors: list[Any]) -> None:
    layers = np.array([layer.layer for layer in drift.layers])
    axis.bar(layers - 0.2, [layer.rate for layer in drift.layers], width=0.4, color=colors)
    any_head = [layer.step_rate for layer in drift.layers]
    axis.bar(layers + 0.2, any_head, width=0.4, color=colors, alpha=0.45)
    axis.axhline(drift.correction_rate, color=ACCENT, linewidth=1.4, linestyle="--")
    axis.set_ylim(0.0, max(0.02, 1.15 * max(drift.correction_rate, *any_head)))
    axis.yaxis.set_major_formatter(lambda share, _position: percent(share))
    axis.set_title("Corrected at the layer's tau", loc="left", fontsize=10, color=INK)
    axis.set_ylabel("dark: KV heads, pale: steps with any", color=INK)


def _places(layer: int, n_heads: int) -> list[float]:
    """Coordinates of a layer's KV heads on the axis of layers."""
    return [layer + _HEADS_WIDTH * ((head + 0.5) / n_heads - 0.5) for head in range(n_heads)]
