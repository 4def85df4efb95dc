"""Timeline of decode steps with the cache on the host: a picture of a few steps, and the share of copying that is hidden.

The same steps twice: with copies in the background, and with the same copies in the step. Times are sums of a trace's spans.
"""

import dataclasses
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Report, Row, check_close, take_turns
from benchmarks.models import PAGE_SIZE, exported_model, random_checkpoint
from benchmarks.speed.recall_cache import (
    AS_AT_08,
    FREEKV,
    RecallSide,
    WithQueries,
    fill_pages,
    limits_of,
    place_prompt,
    recall_side,
)
from benchmarks.speed.recall_sides import IN_TURN, NARROW, OWN_PAGES, STREAMED, WIDE, check_placed
from benchmarks.speed.synchronous_copies import SynchronousCopies
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.paging import Floats
from trt_kv.policy import Policy
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.recall.background import Copies, ThreadedCopies
from trt_kv.runtime.backends.host.recall.store import host_tier_at
from trt_kv.runtime.trace import Trace

STEPS_PER_TURN = 3
CHECK_STEPS = 3
REPOSITORY = Path(__file__).parent.parent.parent
PICTURE, TRACE = "recall_timeline.png", "recall_timeline_trace.json"
JOBS = ("recalling pages", "storing pages")
DENSE, ATTENTION, AT_ONCE = ("#c9d6e8", "dense layers"), ("#2f5d9e", "attention"), ("#edae49", "recall at once (drift)")
COPYING, WAITING = ("#2a9d5c", "choosing and copying pages"), ("#d1495b", "waiting for copies or for attention")
COLOURS = {
    "decode step": DENSE,
    "cache": ATTENTION,
    "attention": ATTENTION,
    "join": WAITING,
    "recall at once": AT_ONCE,
    "recalling pages": COPYING,
    "storing pages": COPYING,
    "choose pages": COPYING,
    "waiting for attention": WAITING,
}
"""Colour and name of each kind of span, outer ones first."""

Interval = tuple[float, float]
Event = Mapping[str, Any]


def run(folder: Path, *, quick: bool) -> Report:
    """Trace both sides; the picture and one turn's trace go to the documents, with ``quick`` to ``folder``."""
    shape = NARROW if quick else dataclasses.replace(WIDE, n_layers=4)
    policy = dataclasses.replace(FREEKV, tokens=512) if quick else FREEKV
    context, rounds = (2048, 2) if quick else (131072, 8)
    model = exported_model(random_checkpoint(shape, folder / "checkpoint"), folder / "graphs")
    config, executor = model.config, model.executor()
    queries = AS_AT_08.queries(config, 1 + CHECK_STEPS + STEPS_PER_TURN * (rounds + 1))
    traces = {STREAMED: Trace(), IN_TURN: Trace()}
    sides = {
        name: _side(executor, config, copies, policy, context, queries, traces[name])
        for name, copies in ((STREAMED, ThreadedCopies()), (IN_TURN, SynchronousCopies()))
    }
    logits = [side.decode(CHECK_STEPS) for side in sides.values()]
    checks = [check_placed(folder), check_close(f"logits at {context} tokens, both sides", *logits, within=0.0)]
    events: dict[str, list[list[Event]]] = {name: [] for name in sides}

    def turn(name: str) -> None:
        sides[name].settle()
        traces[name].events.clear()
        sides[name].turn(STEPS_PER_TURN)
        events[name].append(list(traces[name].events))

    timings = take_turns({name: functools.partial(turn, name) for name in sides}, rounds=rounds, warmup=1)
    rows = [_row(name, events[name][1:], sides[name]) for name in sides]
    ratio = {"ratio": timings.ratio(STREAMED, IN_TURN), "ratio_95_percent": timings.interval(STREAMED, IN_TURN)}
    picture = (folder if quick else REPOSITORY / "docs" / "images") / PICTURE
    title = (
        f"{shape.n_layers} layers as wide as Llama 3.2 1B's, {context} tokens in RAM, budget {policy.tokens}, random numbers"
    )
    draw({name: _typical(turns[1:]) for name, turns in events.items()}, picture, title=title)
    document = traces[STREAMED].to_json()
    trace = (folder if quick else REPOSITORY / "benchmarks" / "results") / TRACE
    trace.write_text(json.dumps(document) + "\n")
    for side in sides.values():
        side.close()
    return Report(
        title="Timeline of decode steps with the cache on the host",
        settings={
            "shape": shape.hf_config,
            "context_tokens": context,
            "budget_tokens": policy.tokens,
            "drift": dataclasses.asdict(AS_AT_08),
            "steps": rounds * STEPS_PER_TURN,
            "steps_per_turn": STEPS_PER_TURN,
            "picture": PICTURE,
            "trace": TRACE,
        },
        checks=checks,
        tables={"ms per step, from the traces": rows, f"a step, {STREAMED} / {IN_TURN}": [ratio]},
    )


def _side(
    executor: DenseExecutor,
    config: ModelConfig,
    copies: Copies,
    policy: Policy,
    context: int,
    queries: Floats,
    trace: Trace,
) -> RecallSide:
    """A sequence with its own pages in memory, with the same content on all sides."""
    n_pages = config.n_layers * context // PAGE_SIZE
    host = host_tier_at(
        "ram",
        n_pages=n_pages + config.n_layers * OWN_PAGES,
        page_size=PAGE_SIZE,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
    )
    with_queries = WithQueries(executor, queries, first=context, trace=trace)
    side = recall_side(with_queries, config, host, copies, policy=policy, trace=trace)
    fill_pages(host, side.recall.summaries, n_pages)
    place_prompt(side.recall, side.sequence, limits_of(policy), context, queries[0])
    return side


def _row(name: str, turns: Sequence[Sequence[Event]], side: RecallSide) -> Row:
    """Sums over all turns. ``hidden``: the share of background work that ran while the model's thread worked, too."""
    events = [event for turn in turns for event in turn]
    n_steps = len(_spans(events, "decode step"))

    def per_step(*names: str) -> float:
        return float(sum(event["dur"] for event in events if event["name"] in names)) / 1e3 / n_steps

    inside = ("attention", "join", "recall at once")
    choosing: float = sum(job["dur"] for job in _within(events, "choose pages", JOBS)) / 1e3 / n_steps
    working, hidden = (float(sum(parts)) / 1e3 / n_steps for parts in zip(*(hidden_work(turn) for turn in turns), strict=True))
    times = {
        "step_ms": per_step("decode step"),
        "dense_ms": per_step("decode step") - per_step("cache"),
        "attention_ms": per_step("attention"),
        "waiting_ms": per_step("join"),
        "at_once_ms": per_step("recall at once"),
        "bookkeeping_ms": per_step("cache") - per_step(*inside),
        "background_choosing_ms": choosing,
        "background_copying_ms": working - choosing,
        "hidden_ms": hidden,
    }
    counts = side.recall.statistics
    return {
        "side": name,
        **{what: round(value, 2) for what, value in times.items()},
        "hidden_percent": round(100 * hidden / working, 1),
        "corrected_heads": round(counts.head_rate, 3),
    }


def _typical(turns: Sequence[list[Event]]) -> list[Event]:
    """The turn whose steps took the median time. A single turn may show the opposite of all turns together."""
    return sorted(turns, key=lambda turn: sum(end - begin for begin, end in _spans(turn, "decode step")))[len(turns) // 2]


def _within(events: Iterable[Event], name: str, outer: Sequence[str]) -> list[Event]:
    """Spans of a name that are inside one of the ``outer`` spans of their thread."""
    events = list(events)
    around = [(e["tid"], e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] in outer]
    return [
        e
        for e in events
        if e["name"] == name and any(e["tid"] == tid and begin <= e["ts"] <= end for tid, begin, end in around)
    ]


def hidden_work(events: Sequence[Event]) -> tuple[float, float]:
    """Microseconds of background work, and those of it that ran while a step was not waiting for copies."""
    working = _working(events)
    steps, joins = _spans(events, "decode step"), _spans(events, "join")
    hidden = sum(_common(part, steps) - _common(part, joins) for part in working)
    return sum(end - begin for begin, end in working), hidden


def _working(events: Sequence[Event]) -> list[Interval]:
    """Working times of jobs: their spans without those in which they waited for attention."""
    parts: list[Interval] = []
    waits = [(e["tid"], e["ts"], e["ts"] + e["dur"]) for e in events if e["name"] == "waiting for attention"]
    for job in (event for event in events if event["name"] in JOBS):
        begin, end = job["ts"], job["ts"] + job["dur"]
        for _, wait_begin, wait_end in sorted(wait for wait in waits if wait[0] == job["tid"] and begin <= wait[1] < end):
            parts.append((begin, wait_begin))
            begin = wait_end
        parts.append((begin, end))
    return parts


def _spans(events: Sequence[Event], name: str) -> list[Interval]:
    return [(event["ts"], event["ts"] + event["dur"]) for event in events if event["name"] == name]


def _common(part: Interval, others: Sequence[Interval]) -> float:
    """The length of an interval that the others cover, which do not overlap each other."""
    return float(sum(max(0.0, min(part[1], end) - max(part[0], begin)) for begin, end in others))


def draw(turns: Mapping[str, Sequence[Event]], path: Path, *, title: str) -> None:
    """One panel per side on one scale: a row per thread, and below it the background work by whether it is hidden."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    figure = Figure(figsize=(12, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    rows = [1 + len(_threads(events)) for events in turns.values()]
    panels = figure.subplots(len(turns), 1, sharex=True, height_ratios=rows)
    for axes, (name, events) in zip(np.atleast_1d(panels), turns.items(), strict=True):
        start = min(event["ts"] for event in events)
        threads = _threads(events)
        for event in sorted(events, key=lambda event: list(COLOURS).index(event["name"])):
            row, colour = threads.index(event["tid"]), COLOURS[event["name"]][0]
            axes.broken_barh([((event["ts"] - start) / 1e3, event["dur"] / 1e3)], (row - 0.4, 0.8), color=colour, linewidth=0)
        steps, joins = _spans(events, "decode step"), _spans(events, "join")
        for begin, end in _working(events):
            is_hidden = _common((begin, end), steps) - _common((begin, end), joins) > 0.5 * (end - begin)
            colour = COLOURS["recalling pages"][0] if is_hidden else COLOURS["join"][0]
            bar = ((begin - start) / 1e3, (end - begin) / 1e3)
            axes.broken_barh([bar], (len(threads) - 0.4, 0.35), color=colour, linewidth=0)
        working, hidden = hidden_work(events)
        labels = ["model", *(f"copies {i}" for i in range(1, len(threads)))]
        axes.set_yticks(range(len(threads) + 1), [*labels, "hidden?"])
        axes.invert_yaxis()
        axes.set_title(
            f"{name}: {sum(end - begin for begin, end in steps) / 1e3 / len(steps):.0f} ms per step, "
            f"{hidden / working:.0%} of the background work hidden behind the model's",
            fontsize=10,
            loc="left",
        )
        for begin, _ in steps:
            axes.axvline((begin - start) / 1e3, color="black", linewidth=0.6, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    np.atleast_1d(panels)[-1].set_xlabel("ms; a dotted line begins a step")
    figure.suptitle(title, fontsize=10)
    patches = [Patch(color=colour, label=label) for colour, label in dict.fromkeys(COLOURS.values())]
    figure.legend(handles=patches, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _threads(events: Sequence[Event]) -> list[int]:
    """The model's thread, then the others in order of appearance."""
    main = next(event["tid"] for event in events if event["name"] == "decode step")
    return list(dict.fromkeys([main, *(event["tid"] for event in sorted(events, key=lambda event: event["ts"]))]))
