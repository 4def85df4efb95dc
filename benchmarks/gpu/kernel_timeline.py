"""Timeline of the kernels of a decode step on a GPU, by torch's profiler: a picture, and the share of recall that is hidden.

    python -m benchmarks.gpu.kernel_timeline [RESULTS [PICTURE]]

draws the steps in the results of ``freekv``; it needs no GPU.
"""

import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError, Row, load

REPOSITORY = Path(__file__).parent.parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results" / "gpu_freekv.json"
PICTURE = REPOSITORY / "docs" / "images" / "gpu_recall_timeline.png"
KINDS = {
    "dense": ("#c9d6e8", "dense products and norms"),
    "attention": ("#2f5d9e", "attention"),
    "choose": ("#edae49", "test drift, choose pages, plan moves"),
    "recall": ("#2a9d5c", "recall: pages over the bus"),
}
"""Colour and name of each kind of kernel."""
_ATTENDS = "decode_kernel"
_KIND_OF = {**dict.fromkeys((_ATTENDS, "combine_kernel"), "attention"), "recall_kernel": "recall"}
_OURS = re.compile(r"[a-z_]+_kernel")
"""Names of our other kernels; those of torch and its libraries contain types or sizes."""
_LAYERS_SHOWN = 4
_GAP_US = 1000.0
"""Steps are profiled with pauses between them that are longer than any gap within a step."""

_SLEEP, _SLEEP_CYCLES = "spin_kernel", 10**8

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Event:
    """A kernel that ran on a stream."""

    name: str
    stream: int
    start_us: float
    duration_us: float

    @property
    def end_us(self) -> float:
        return self.start_us + self.duration_us

    @property
    def kind(self) -> str:
        """One of ``KINDS``."""
        return _KIND_OF.get(self.name) or ("choose" if _OURS.fullmatch(self.name) else "dense")

    @property
    def attends(self) -> bool:
        """Once in every layer."""
        return self.name == _ATTENDS


def wake_profiler() -> None:
    """Start the profiler, which must run before a CUDA graph is recorded to see the graph's kernels. Needs a GPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]):
        torch.ones(1, device="cuda")
        torch.cuda.synchronize()


def profiled_steps(step: Callable[[], object], n_steps: int) -> list[list[Event]]:
    """Kernels of each of the last ``n_steps`` calls of ``step``, after one warm-up call. Needs a GPU.

    The GPU is kept busy until most of a step has been launched, so that gaps between launches do not show as idle time.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(n_steps + 1):
            torch.cuda._sleep(_SLEEP_CYCLES)
            step()
            torch.cuda.synchronize()
            time.sleep(5 * _GAP_US / 1e6)
    with tempfile.TemporaryDirectory(prefix="trt-kv-bench-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return steps_of(json.loads(path.read_text())["traceEvents"])[-n_steps:]


def steps_of(trace: Iterable[Mapping[str, Any]]) -> list[list[Event]]:
    """The kernels in events of a Chrome trace, divided into steps at long idle times."""
    events = [
        Event(name=e["name"], stream=int(e["args"]["stream"]), start_us=float(e["ts"]), duration_us=float(e["dur"]))
        for e in trace
        if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset") and _SLEEP not in e["name"]
    ]
    steps: list[list[Event]] = []
    end = float("-inf")
    for event in sorted(events, key=lambda event: event.start_us):
        if event.start_us > end + _GAP_US:
            steps.append([])
        steps[-1].append(event)
        end = max(end, event.end_us)
    return [step for step in steps if any(event.attends for event in step)]


def main_stream(events: Sequence[Event]) -> int:
    """The stream that attends."""
    return next(event.stream for event in events if event.attends)


def tells_streams_apart(events: Sequence[Event]) -> bool:
    """Whether one stream attends and computes while pages are recalled on another one. This is checked because a CUDA graph may
    run on other streams than it was recorded on.
    """
    main = main_stream(events)
    model = [event.stream == main for event in events if event.kind == "dense" or event.attends]
    is_one = all(event.stream == main for event in events if event.attends) and sum(model) > 0.9 * len(model)
    return is_one and any(event.kind == "recall" and event.stream != main for event in events)


def hidden_work(events: Sequence[Event]) -> Row:
    """Microseconds of one step, and the share of the side stream's work that ran while the main stream's kernels did."""
    main = main_stream(events)
    busy = _joined([(event.start_us, event.end_us) for event in events if event.stream == main])
    row: dict[str, float | None] = {
        "step_us": max(event.end_us for event in events) - min(event.start_us for event in events),
        "main_busy_us": sum(end - begin for begin, end in busy),
    }
    for kind in ("recall", "choose"):
        ahead = [event for event in events if event.kind == kind and event.stream != main]
        total = sum(event.duration_us for event in ahead)
        hidden = sum(_common((event.start_us, event.end_us), busy) for event in ahead)
        at_once = sum(event.duration_us for event in events if event.kind == kind and event.stream == main)
        row |= {f"{kind}_ahead_us": total, f"{kind}_hidden_percent": 100 * hidden / total if total else None}
        row[f"{kind}_main_us"] = at_once
    return {name: None if value is None else round(value, 1) for name, value in row.items()}


def _joined(intervals: Iterable[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def _common(part: Interval, others: Iterable[Interval]) -> float:
    """The length of an interval that the others cover, which do not overlap each other."""
    return sum(max(0.0, min(part[1], end) - max(part[0], begin)) for begin, end in others)


def to_json(events: Sequence[Event]) -> list[str]:
    """A line for each: stream, start and duration in microseconds, name."""
    first = min(event.start_us for event in events)
    return [f"{e.stream} {e.start_us - first:.1f} {e.duration_us:.1f} {e.name[:48]}" for e in events]


def from_json(lines: Iterable[str]) -> list[Event]:
    """The kernels that ``to_json`` wrote; times start at 0."""
    events = []
    for line in lines:
        stream, start, duration, name = line.split(" ", 3)
        events.append(Event(name=name, stream=int(stream), start_us=float(start), duration_us=float(duration)))
    return events


def draw(events: Sequence[Event], path: Path, *, title: str) -> None:
    """One step, and some of its layers enlarged: a row for the main stream and one for the others, coloured by kernel kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    main, first = main_stream(events), min(event.start_us for event in events)
    attended = [event.end_us for event in events if event.attends]
    middle = max(0, (len(attended) - _LAYERS_SHOWN) // 2)
    part = attended[middle], attended[min(middle + _LAYERS_SHOWN, len(attended) - 1)]
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 1)
    for axes, caption in zip(panels, (f"one step of {len(attended)} layers", f"{_LAYERS_SHOWN} of its layers"), strict=True):
        for kind, (colour, _) in KINDS.items():
            for row in (0, 1):
                bars = [
                    ((event.start_us - first) / 1e3, event.duration_us / 1e3)
                    for event in events
                    if event.kind == kind and (event.stream != main) == bool(row)
                ]
                axes.broken_barh(bars, (row - 0.4, 0.8), color=colour, linewidth=0)
        axes.set_yticks([0, 1], ["main stream", "side stream"])
        axes.set_ylim(1.6, -0.6)
        axes.set_title(caption, fontsize=9, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].axvspan(*((at - first) / 1e3 for at in part), color="black", alpha=0.08, linewidth=0)
    panels[1].set_xlim(*((at - first) / 1e3 for at in part))
    for panel in panels:
        panel.set_xlabel("ms")
    hidden = hidden_work(events)["recall_hidden_percent"]
    suffix = "" if hidden is None else f"; {hidden:.0f} % of the recall ahead runs behind kernels of the main stream"
    figure.suptitle(title + suffix, fontsize=10)
    patches = [Patch(color=colour, label=label) for colour, label in KINDS.values()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw_results(results: Path = RESULTS, picture: Path = PICTURE) -> None:
    """Draw the step in a results file of ``freekv``; ``BenchmarkError`` if there is none."""
    timeline = load(results)["settings"].get("timeline")
    if timeline is None:
        raise BenchmarkError("the results have no timeline", got=str(results), expected="a run of freekv on a GPU")
    draw(from_json(timeline["events"]), picture, title=timeline["title"])


if __name__ == "__main__":
    draw_results(*(Path(argument) for argument in sys.argv[1:3]))
