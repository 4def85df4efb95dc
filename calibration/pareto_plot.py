"""The picture of policies on tasks: accuracy against bytes of cache and against time."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from trt_kv.calibration.figure import new_figure
from trt_kv.calibration.recipe_plot import ACCENT, FAINT, INK
from trt_kv.errors import TrtKvError
from trt_kv.json_file import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Point(Protocol):
    """A policy's results; see ``trt_kv.pipeline.advice.MeasuredPolicy``."""

    @property
    def name(self) -> str: ...
    @property
    def accuracy(self) -> float: ...
    @property
    def accuracy_low(self) -> float: ...
    @property
    def accuracy_high(self) -> float: ...
    @property
    def cache_bytes(self) -> int: ...
    @property
    def seconds_per_task(self) -> float: ...
    @property
    def on_front(self) -> bool: ...


def picture_from_policies(policies: Sequence[Point], path: Path, *, title: str) -> None:
    """Write a PNG to ``path``, whole or not at all: accuracy with 95 % intervals, against MiB of cache per task on the left and
    seconds per task on the right. Policies that no other one beats are in colour. ``MissingDependencyError`` without
    matplotlib.
    """
    figure = new_figure(11.0, 4.4)
    left, right = figure.subplots(1, 2, sharey=True)
    _draw(left, policies, lambda policy: policy.cache_bytes / 2**20, "MiB of KV cache per task, after reading")
    _draw(right, policies, lambda policy: policy.seconds_per_task, "seconds per task")
    left.set_ylabel("share of right answers")
    figure.suptitle(title, color=INK, fontsize=12)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, png.getvalue(), kind="picture of policies", error=TrtKvError)


def _draw(axis: "Axes", policies: Sequence[Point], of: Callable[[Point], float], label: str) -> None:
    for at, policy in enumerate(policies):
        color, x = ACCENT if policy.on_front else FAINT, of(policy)
        axis.vlines(x, policy.accuracy_low, policy.accuracy_high, color=color, linewidth=1.2)
        axis.plot([x], [policy.accuracy], "o", color=color)
        axis.annotate(
            policy.name, (x, policy.accuracy), xytext=(5, 4 - 11 * (at % 4)), textcoords="offset points", color=INK, fontsize=9
        )
    axis.set_xlabel(label)
    axis.set_xlim(0, 1.2 * max(1e-9, *map(of, policies)))  # with room for the last name
    axis.set_ylim(-0.02, 1.02)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(colors=INK, labelsize=9)
