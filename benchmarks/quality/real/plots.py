"""The picture of a real model's report: marks against the kept share, a panel per mode."""

import io
from typing import TYPE_CHECKING

from benchmarks.quality.plots.style import FAINT, INK, Style, accuracy_axis, curve, headline, legend, panels, share_axis, title
from benchmarks.quality.real.results import RealResults
from benchmarks.quality.real.tables import marks_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = {
    "kvzap": Style(color="#111827", width=2.4),
    "lukv": Style(color="#b8860b", width=2.0),
    "prefixkv": Style(color="#c2410c"),
    "snapkv": Style(color="#1d4ed8"),
    "random": Style(color=FAINT, dash="--"),
}
"""Policies in the picture; the tables have all."""
TITLES = {"aware": "Question read before the eviction", "agnostic": "Question asked after the eviction"}


def kept_picture(results: RealResults) -> "Figure":
    """Mean marks of the families that the model can do, at the main length, against what is held."""
    plan = results.settings.main
    found = {mode: marks_of(results, mode, plan.n_tokens) for mode in TITLES}
    known = {mode: marks for mode, marks in found.items() if marks is not None}
    figure, axes = panels(len(known), columns=max(1, len(known)), width=4.8, height=3.8)
    for axis, (mode, marks) in zip(axes, known.items(), strict=True):
        axis.axhline(marks.mean(("full", None)).value, color=INK, linewidth=0.8, linestyle=":", label="full cache")
        for name, style in SHOWN.items():
            keys = [key for key in ((name, budget) for budget in plan.budgets) if key in marks.keys]
            if keys:
                curve(axis, [marks.mean_of(key, "kept") or 0.0 for key in keys], [marks.mean(key) for key in keys], style, name)
        share_axis(axis, sorted(plan.budgets))
        accuracy_axis(axis, "mean mark")
        title(axis, f"{TITLES[mode]}: {marks.n_documents} documents")
    if known:
        legend(figure, axes)
    headline(figure, f"{results.model.name}, {plan.n_tokens} tokens, families that the full cache can do")
    return figure


def png(results: RealResults) -> bytes:
    """The picture as PNG."""
    buffer = io.BytesIO()
    kept_picture(results).savefig(buffer, format="png", dpi=110, metadata={"Software": f"trt-kv {results.versions.trt_kv}"})
    return bytes(buffer.getvalue())
