"""The plot of a recipe: the kept share of each layer, and the cumulative curves it was derived from."""

import io
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trt_kv.calibration.figure import new_figure
from trt_kv.errors import TrtKvError
from trt_kv.json_file import write_atomically
from trt_kv.recipe import Curves, Recipe
from trt_kv.require import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#22262b"
FAINT = "#8a9199"
ACCENT = "#c2410c"
_SHARE_TICKS = (0.0, 0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)


def picture_from_recipe(recipe: Recipe, path: Path) -> None:
    """Write a PNG of ``recipe`` to ``path``, whole or not at all.

    Left: kept share per layer, the mean budget as a line, the range over the calibration prompts as whiskers, or instead the
    shares of KV heads as dots. Right: each
    layer's cumulative importance against its kept share, a dot at the recipe's share, and the common mass as a line; left
    out for recipes without curves. Layers are coloured by depth. ``MissingDependencyError`` without matplotlib.
    """
    png = io.BytesIO()
    _figure(recipe).savefig(png, format="png", dpi=150, metadata={"Software": recipe.created_by})
    write_atomically(path, png.getvalue(), kind="recipe's picture", error=TrtKvError)


def _figure(recipe: Recipe) -> "Figure":
    figure = new_figure(11.0 if recipe.curves else 6.0, 4.4)
    colors = depth_colors(len(recipe.kept))
    axes = figure.subplots(1, 2 if recipe.curves else 1, squeeze=False)[0]
    _draw_shares(axes[0], recipe, colors)
    if recipe.curves is not None:
        _draw_curves(axes[1], recipe, recipe.curves, colors)
        add_depth_bar(figure, axes[1], colors)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=9)
    window = f" (last {recipe.score.window} queries)" if recipe.score.window else ""
    figure.suptitle(
        f"{recipe.model.name}: {percent(recipe.budget)} kept, score {recipe.score.name}{window}", color=INK, fontsize=12
    )
    return figure


def _draw_shares(axis: "Axes", recipe: Recipe, colors: list[Any]) -> None:
    layers = range(len(recipe.kept))
    axis.bar(layers, recipe.kept, width=0.8, color=colors)
    samples = recipe.calibration.samples
    if len(samples) > 1 and recipe.heads is None:
        lowest = np.min([sample.kept for sample in samples], axis=0)
        highest = np.max([sample.kept for sample in samples], axis=0)
        label = f"range over {len(samples)} prompts"
        if _few(colors):
            axis.vlines(layers, lowest, highest, color="white", linewidth=2.6)
        axis.vlines(layers, lowest, highest, color=INK, linewidth=1.2, label=label)
    if recipe.heads is not None:
        heads = recipe.heads.at(recipe.budget)
        for head in range(recipe.heads.n_kv_heads):
            shares = [layer[head] for layer in heads]
            axis.plot(layers, shares, ".", color=INK, markersize=4, label=None if head else "each KV head")
    axis.axhline(recipe.budget, color=ACCENT, linewidth=1.4, linestyle="--", label=f"mean budget {percent(recipe.budget)}")
    axis.xaxis.set_major_locator(require("matplotlib.ticker").MaxNLocator(nbins=12, integer=True))
    axis.yaxis.set_major_formatter(lambda share, _position: percent(share))
    axis.set_xlim(-0.7, len(recipe.kept) - 0.3)
    heads_kept = () if recipe.heads is None else itertools.chain(*recipe.heads.at(recipe.budget))
    axis.set_ylim(0.0, 1.18 * max(*recipe.kept, recipe.budget, *heads_kept))
    axis.set_title("Kept share of each layer", loc="left", fontsize=10, color=INK)
    axis.set_xlabel("layer", color=INK)
    axis.set_ylabel("kept tokens", color=INK)
    axis.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)


def _draw_curves(axis: "Axes", recipe: Recipe, curves: Curves, colors: list[Any]) -> None:
    few = _few(colors)
    for curve, share, color in zip(curves.layers, recipe.kept, colors, strict=True):
        if not curve:
            continue
        axis.plot(curves.kept_share, curve, color=color, linewidth=1.6 if few else 0.9)
        mass = np.interp(share, curves.kept_share, curve)
        axis.plot(
            share, mass, "o", color=color, markersize=6 if few else 3, markeredgecolor="white" if few else color, zorder=4
        )
    if recipe.mass is not None:
        axis.axhline(recipe.mass, color=ACCENT, linewidth=1.4, linestyle="--", label=f"common mass {percent(recipe.mass)}")
        axis.legend(frameon=False, fontsize=9, loc="lower right")
    axis.set_xscale("function", functions=(lambda share: np.sqrt(np.maximum(share, 0.0)), np.square))
    axis.set_xlim(0.0, 1.0)
    axis.set_ylim(0.0, 1.02)
    axis.set_xticks(_SHARE_TICKS, [percent(share) for share in _SHARE_TICKS])
    axis.yaxis.set_major_formatter(lambda share, _position: percent(share))
    axis.grid(color=FAINT, alpha=0.25, linewidth=0.6)
    sinks = "" if curves.sinks == "in" else ", sinks left out"
    axis.set_title(f"Importance held by the highest-ranked tokens{sinks}", loc="left", fontsize=10, color=INK)
    axis.set_xlabel("kept tokens, most important first (square-root scale)", color=INK)
    axis.set_ylabel("cumulative importance", color=INK)


def add_depth_bar(figure: "Figure", axis: "Axes", colors: list[Any]) -> None:
    """The colour legend: one patch per layer, first layer at the bottom."""
    n_layers = len(colors)
    matplotlib_colors = require("matplotlib.colors")
    scale = require("matplotlib.cm").ScalarMappable(
        norm=matplotlib_colors.BoundaryNorm(np.arange(n_layers + 1) - 0.5, n_layers),
        cmap=matplotlib_colors.ListedColormap(colors),
    )
    bar = figure.colorbar(scale, ax=axis, pad=0.02, aspect=30)
    step = max(1, n_layers // 8)
    bar.set_ticks(list(range(0, n_layers, step)), labels=[str(layer) for layer in range(0, n_layers, step)])
    bar.set_label("layer", color=INK)
    bar.minorticks_off()
    bar.outline.set_visible(False)


def depth_colors(n_layers: int) -> list[Any]:
    """One colour per layer, from dark for the first to bright for the last, without the palest yellows, which are invisible as
    thin lines.
    """
    colormap = require("matplotlib").colormaps["viridis"]
    return [colormap(0.12 + 0.78 * layer / max(1, n_layers - 1)) for layer in range(n_layers)]


def _few(colors: list[Any]) -> bool:
    """Whether there are few enough layers for halos and wide lines."""
    return len(colors) <= 16


def percent(share: float) -> str:
    """E.g. "12.5%"."""
    return f"{100.0 * share:.3g}%"
