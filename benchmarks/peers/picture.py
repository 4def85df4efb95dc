"""ms per token against context, every row, one panel per model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.rows import OURS, ROWS
from benchmarks.peers.subjects import TITLES

INK, FAINT = "#22262b", "#8a9199"
_OF_ENGINE = {
    "OpenVINO GenAI": "#b45309",
    "llama.cpp": "#7c3aed",
    "onnxruntime-genai": "#be123c",
    "transformers": "#6b7280",
}
_OF_POLICY = {"full": "#111827", "pooledwindow": "#1d4ed8", "refreekv": "#0e7490", "freekv": "#15803d"}


def draw(document: Mapping[str, Any], path: Path) -> None:
    """Write the picture of a document with tables.

    Peers are dashed, and dotted if they evict; synthetic caches are hollow; fp32 weights are thin.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = {caption: lines for caption, lines in document["tables"].items() if caption in TITLES.values()}
    figure, axes = plt.subplots(1, len(panels), figsize=(6.4 * len(panels), 7.0), squeeze=False, layout="constrained")
    for axis, (caption, lines) in zip(axes[0], panels.items(), strict=True):
        _panel(axis, caption, lines)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, caption: str, lines: list[dict[str, Any]]) -> None:
    from matplotlib import ticker

    for row in dict.fromkeys(line["row"] for line in lines):
        found = [line for line in lines if line["row"] == row and line["ms_per_token"] is not None]
        if not found:
            continue
        contexts, times = ([line[column] for line in found] for column in ("context_tokens", "ms_per_token"))
        is_ours = ROWS[row].engine == OURS
        policy = row.removeprefix(f"{OURS} ").split(" ")[0]
        color = _OF_POLICY.get(policy, INK) if is_ours else _OF_ENGINE[ROWS[row].engine]
        is_thin = ROWS[row].weights in ("fp32", "float32")
        width = 1.0 if is_thin else 2.0
        dash = ("-." if row.endswith("file") else "-") if is_ours else (":" if ROWS[row].drops else "--")
        axis.plot(contexts, times, dash, color=color, linewidth=width, label=row, alpha=0.9)
        for line in found:
            fill = "white" if "synthetic" in line["note"] else color
            axis.plot(line["context_tokens"], line["ms_per_token"], "o", color=color, markerfacecolor=fill, markersize=4.5)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = sorted({line["context_tokens"] for line in lines})
    axis.set_xticks(ticks, [f"{n // 1024}k" if n >= 1024 else str(n) for n in ticks])
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    axis.tick_params(which="both", labelsize=7, color=FAINT)
    axis.grid(which="both", color=FAINT, alpha=0.2, linewidth=0.5)
    axis.set_title(caption, fontsize=10, loc="left", color=INK)
    axis.set_xlabel("tokens in the context", fontsize=9)
    axis.set_ylabel("ms per decoded token, median", fontsize=9)
    for spine in ("top", "right"):
        axis.spines[spine].set_visible(False)
    axis.legend(fontsize=7, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))
