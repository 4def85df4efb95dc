"""Figures on the Agg canvas: no display, no global pyplot state."""

import logging
from typing import TYPE_CHECKING

from trt_kv.require import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of ``width`` x ``height`` inches. ``MissingDependencyError`` without matplotlib.

    Where no home folder can be written, as for service users, matplotlib caches in a temporary one. It warns of that as it is
    imported; for the one picture of a run nothing is lost, so the warning is left out.
    """
    log = logging.getLogger("matplotlib")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        figure: Figure = require("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
        require("matplotlib.backends.backend_agg").FigureCanvasAgg(figure)
    finally:
        log.setLevel(level)
    return figure
