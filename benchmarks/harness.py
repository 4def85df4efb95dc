"""Common parts of all benchmarks: checks before measuring, sides that take turns, a record of the machine and versions.

A benchmark is a module with a function ``run(folder, *, quick) -> Report`` that is listed in ``benchmarks.__main__``; those of
``benchmarks.gpu`` are listed there and get no folder.
"""

import dataclasses
import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

import trt_kv
from trt_kv.errors import TrtKvError
from trt_kv.json_file import read_json, write_atomically
from trt_kv.plugins.paging import Floats

VERSION = 1
PACKAGES = ("numba", "numpy", "onnx", "onnxruntime", "torch")
Row = dict[str, Any]


class BenchmarkError(TrtKvError):
    """The sides of a comparison disagree, so that its times would mean nothing; or results cannot be read or written."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check that passed before anything was measured: ``error`` is at most ``allowed``."""

    what: str
    error: float
    allowed: float


@dataclass(frozen=True, kw_only=True)
class Target:
    """A target and the measured value; met if ``measured`` is at most ``limit``."""

    what: str
    measured: float
    limit: float

    @property
    def is_met(self) -> bool:
        return self.measured <= self.limit


@dataclass(frozen=True, kw_only=True)
class Report:
    """Results of one benchmark. Rows of one table have the same keys, which end in their unit; None means not measured."""

    title: str
    settings: Mapping[str, Any]
    checks: Sequence[Check]
    tables: Mapping[str, Sequence[Row]]
    targets: Sequence[Target] = ()

    def __post_init__(self) -> None:
        if not self.checks:
            raise BenchmarkError(f"benchmark {self.title!r} checked nothing before it measured")


def check_close(what: str, got: Floats, expected: Floats, *, within: float) -> Check:
    """The largest absolute difference; ``BenchmarkError`` if it exceeds ``within`` or is NaN."""
    error = float(np.abs(np.asarray(got, np.float64) - np.asarray(expected, np.float64)).max())
    if not error <= within:
        raise BenchmarkError(f"the sides disagree: {what}", got=error, expected=f"at most {within}")
    return Check(what=what, error=error, allowed=within)


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Times of each side in ms, [rounds]; every side ran once in each round."""

    samples_ms: Mapping[str, Floats]

    def row(self, side: str) -> dict[str, float]:
        """Median and percentiles of one side, ms."""
        p10, median, p90 = np.percentile(self.samples_ms[side], [10, 50, 90])
        return {"median_ms": rounded(median), "p10_ms": rounded(p10), "p90_ms": rounded(p90)}

    def ratio(self, side: str, base: str) -> float:
        """median(side) / median(base)."""
        return rounded(np.median(self.samples_ms[side]) / np.median(self.samples_ms[base]))

    def interval(self, side: str, base: str) -> str:
        """95 % bootstrap interval of the ratio of medians, from 1000 resamplings of the rounds."""
        rounds = len(self.samples_ms[side])
        picks = np.random.default_rng(0).integers(rounds, size=(1000, rounds))
        medians = [np.median(self.samples_ms[name][picks], axis=1) for name in (side, base)]
        low, high = np.percentile(medians[0] / medians[1], [2.5, 97.5])
        return f"{low:.2f} .. {high:.2f}"

    def rows(self, base: str) -> list[Row]:
        """One row per side: its times, and its ratio to ``base``."""
        return [
            {
                "side": side,
                **self.row(side),
                "ratio": self.ratio(side, base),
                "ratio_95_percent": self.interval(side, base),
            }
            for side in self.samples_ms
        ]


def take_turns(sides: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 2, pause_s: float = 0.0) -> Timings:
    """Time every side once per round in rotating order, so that noise and drift affect all sides equally.

    ``pause_s`` passes before each call, so that threads of the previous side stop spinning.
    """
    names = list(sides)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for index in range(-warmup, rounds):
        first = index % len(names)
        for name in names[first:] + names[:first]:
            time.sleep(pause_s)
            start = time.perf_counter()
            sides[name]()
            elapsed_ms = (time.perf_counter() - start) * 1e3
            if index >= 0:
                samples[name].append(elapsed_ms)
    return Timings(samples_ms={name: np.array(values) for name, values in samples.items()})


def joined(timings: Sequence[Timings]) -> Timings:
    """The rounds of several measurements of the same sides, concatenated."""
    sides = timings[0].samples_ms
    return Timings(samples_ms={side: np.concatenate([one.samples_ms[side] for one in timings]) for side in sides})


def measured(run: Callable[[], Report]) -> dict[str, Any]:
    """The document of one benchmark: results, machine, versions, and how much other work ran meanwhile."""
    start, busy_start = time.perf_counter(), busy_seconds_of_others()
    report = run()
    elapsed_s = time.perf_counter() - start
    others = (busy_seconds_of_others() - busy_start) / elapsed_s
    return {
        "version": VERSION,
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "elapsed_s": round(elapsed_s, 1),
        "machine": {**machine(), "cores_used_by_others": round(max(0.0, others), 2)},
        "packages": _packages(),
        **dataclasses.asdict(report),
        "targets": [{**dataclasses.asdict(target), "is_met": target.is_met} for target in report.targets],
    }


def begun_document(title: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A document without results, for a benchmark that saves samples while it runs; tables are made from these."""
    return {
        "version": VERSION,
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "title": title,
        "machine": machine(),
        "packages": _packages(),
        "settings": settings,
        "elapsed_s": 0.0,
        "checks": [],
        "samples": [],
    }


def _packages() -> dict[str, str]:
    return {"trt-kv": trt_kv.__version__} | {name: importlib.metadata.version(name) for name in PACKAGES}


def machine() -> dict[str, str | int]:
    """CPU model, usable cores, memory and system."""
    cpuinfo = Path("/proc/cpuinfo")
    models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
    }


def save(document: Mapping[str, Any], path: Path) -> None:
    """Write a document of ``measured`` as JSON, all or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode(), kind="benchmark result", error=BenchmarkError)


def load(path: Path) -> dict[str, Any]:
    """Read what ``save`` wrote; ``BenchmarkError`` if there is nothing."""
    document: dict[str, Any] = read_json(path, kind="benchmark result", error=BenchmarkError)
    return document


def show(document: Mapping[str, Any], console: Console) -> None:
    """Print a document of ``measured`` as tables."""
    machine_of = document["machine"]
    others = machine_of.get("cores_used_by_others", "an unknown number")
    console.print(
        f"{document['title']}. {document['date']}, {machine_of['cores']} cores of {machine_of['cpu']}, "
        f"{others} of them used by other work meanwhile."
    )
    for caption, rows in document["tables"].items():
        table = Table(title=caption, title_justify="left")
        for column in rows[0]:
            table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
        for row in rows:
            table.add_row(*("" if value is None else str(value) for value in row.values()))
        console.print(table)
    for target in document["targets"]:
        verdict = "[green]met[/]" if target["is_met"] else "[red]missed[/]"
        console.print(f"{verdict}: {target['what']}: {target['measured']} (at most {target['limit']})")


def replace_section(path: Path, begin: str, end: str, section: str) -> None:
    """Replace what stands in a file from the marker ``begin`` to the marker ``end``, both included, by ``section``."""
    path.write_text(re.sub(f"{begin}.*{end}", lambda _: section, path.read_text(), flags=re.DOTALL))


def markdown_tables(document: Mapping[str, Any]) -> list[str]:
    """The tables of a document of ``measured``, each below its caption; columns as in the results file, with spaces."""
    return [f"**{caption[0].upper()}{caption[1:]}**\n\n{_markdown_table(rows)}" for caption, rows in document["tables"].items()]


def _markdown_table(rows: Sequence[Row]) -> str:
    head = [column.replace("_", " ") for column in rows[0]]
    lines = [head, ["---"] * len(head), *(["" if value is None else str(value) for value in row.values()] for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def busy_seconds_of_others() -> float:
    """CPU seconds used since boot by everything except this process and its finished children."""
    system, own = psutil.cpu_times(), os.times()
    return float(sum(system) - system.idle - system.iowait - sum(own[:4]))


def rounded(value: Any) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{float(value):.4g}")
