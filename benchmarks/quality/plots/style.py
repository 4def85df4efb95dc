"""Style of the report's pictures: one colour per policy or task, the same in every picture, and plain axes."""

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quality.results import PolicyFacts, Results
from trt_kv.calibration.statistics import Estimate
from trt_kv.require import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#22262b"
FAINT = "#8a9199"


@dataclass(frozen=True, kw_only=True)
class Style:
    """How a policy is drawn; ``dash`` is a matplotlib line style."""

    color: str
    marker: str = "o"
    dash: Any = "-"
    width: float = 1.5


_STYLES = {
    "prefixkv": Style(color="#111827", width=2.4),
    "reach": Style(color="#b8860b", marker="*", width=2.4),
    "snapkv": Style(color="#1d4ed8"),
    "prefixkv_paper": Style(color="#c2410c"),
}
SHOWN = tuple(_STYLES)
"""Policies in pictures, with the full cache at most five series: the best ones, a baseline and the published method. The tables
of the report have all.
"""


def shown_policies(results: Results) -> list[PolicyFacts]:
    """Those of ``SHOWN``, ours first, so that published policies with equal values are drawn over them."""
    return [policy for policy in results.in_groups("ours", "published") if policy.name in SHOWN]


def style_of(policy: PolicyFacts) -> Style:
    """The policy's own style."""
    return _STYLES[policy.name]


def panels(n: int, *, columns: int, width: float = 4.1, height: float = 3.5) -> "tuple[Figure, list[Axes]]":
    """A figure with ``n`` panels on the Agg canvas: no display, no global pyplot state. Panels left over are empty."""
    rows = max(1, -(-n // columns))
    figure: Figure = require("matplotlib.figure").Figure(figsize=(width * columns, height * rows + 0.4), layout="constrained")
    require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(colors=INK, labelsize=8)
    for axis in axes[n:]:
        axis.set_axis_off()
    return figure, axes[:n]


def title(axis: "Axes", text: str) -> None:
    """The title of one panel."""
    axis.set_title(text, loc="left", fontsize=10, color=INK)


def headline(figure: "Figure", text: str) -> None:
    """The title of a figure."""
    figure.suptitle(text, color=INK, fontsize=11, x=0.01, ha="left")


def legend(figure: "Figure", axes: "Iterable[Axes]") -> None:
    """One legend for all panels, at the right."""
    found: dict[str, Any] = {}
    for axis in axes:
        handles, labels = axis.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            found.setdefault(label, handle)
    figure.legend(found.values(), found.keys(), loc="outside right center", frameon=False, fontsize=9)


def curve(axis: "Axes", places: Any, estimates: Sequence[Estimate], style: Style, label: str, *, alpha: float = 0.25) -> None:
    """Estimates as a line with intervals."""
    axis.vlines(places, [e.low for e in estimates], [e.high for e in estimates], color=style.color, alpha=alpha, linewidth=1.2)
    axis.plot(
        places,
        [e.value for e in estimates],
        color=style.color,
        marker=style.marker,
        linestyle=style.dash,
        linewidth=style.width,
        markersize=4.5,
        label=label,
    )


def share_axis(axis: "Axes", shares: Sequence[float]) -> None:
    """The x axis of kept shares, on a square-root scale, which enlarges the small shares at which policies differ."""
    axis.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0.0)), np.square))
    axis.set_xticks(shares)
    axis.set_xlim(0.6 * min(shares), 1.02)
    percents(axis.xaxis)
    axis.set_xlabel("mean kept share", color=INK, fontsize=9)
    axis.grid(color=FAINT, alpha=0.25, linewidth=0.6)


def percents(axis: Any) -> None:
    """Ticks of an x or y axis in percent."""
    axis.set_major_formatter(lambda share, _position: f"{100 * share:.0f} %")


def accuracy_axis(axis: "Axes", what: str = "exact answers") -> None:
    """A y axis for shares from none to all, of ``what``."""
    axis.set_ylim(-0.03, 1.05)
    percents(axis.yaxis)
    axis.set_ylabel(what, color=INK, fontsize=9)


def log_axis(axis: "Axes", what: str) -> None:
    """A logarithmic y axis for ``what`` with ticks at round numbers, as fine as its range needs."""
    axis.set_yscale("log")
    axis.set_ylabel(what, color=INK, fontsize=9)
    low, high = axis.get_ylim()
    ticks: Sequence[float] = (1, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 3000, 10_000)
    if high / low < 1.6:
        step = 0.1 if high - low > 0.2 else 0.02 if high - low > 0.04 else 0.005
        ticks = (np.arange(round(low / step), high / step) * step).tolist()
    shown = [tick for tick in ticks if low <= tick <= high]
    axis.set_yticks(shown, [f"{tick:g}" for tick in shown])
    axis.yaxis.set_minor_locator(require("matplotlib.ticker").NullLocator())
    axis.set_ylim(low, high)


def heatmap(
    axis: "Axes", values: "np.ndarray", texts: Sequence[Sequence[str]], rows: Sequence[str], columns: Sequence[str]
) -> None:
    """Shares from 0 to 1 as colours, with a text each."""
    axis.imshow(values, cmap="viridis", vmin=0.0, vmax=1.0, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        color = "white" if value < 0.6 else INK
        axis.text(column, row, texts[row][column], ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), rows)
    axis.spines[["left", "bottom"]].set_visible(False)
    axis.tick_params(length=0)


def png(figure: "Figure", results: Results) -> bytes:
    """The PNG, with the same bytes for the same results and version of matplotlib."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": f"trt-kv {results.versions.trt_kv}"})
    return buffer.getvalue()
