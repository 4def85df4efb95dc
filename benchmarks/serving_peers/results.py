"""From samples to tables and aims."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Row as Line
from benchmarks.harness import Target, rounded
from benchmarks.serving_peers.plan import CONCURRENCY, DOORS, HTTP, IN_PROCESS, MEMORY, TRITON
from benchmarks.serving_peers.rows import ROWS
from benchmarks.serving_peers.samples import OUT_OF_TIME, Sample

TIMES, COST_PERCENT = 3.0, 5.0
"""Aims: our throughput in equal memory beside the best rival's, and what Triton may cost."""
CAPTIONS = {
    CONCURRENCY: "Against the number of clients",
    MEMORY: "In equal memory",
    DOORS: "What a door costs",
}


def tables_of(samples: Sequence[Sample]) -> dict[str, list[Line]]:
    """By caption; without those that nothing was measured for."""
    found = {
        CAPTIONS[MEMORY]: [_memory_line(sample) for sample in _ordered(samples, MEMORY)],
        CAPTIONS[CONCURRENCY]: [_line(sample) for sample in _ordered(samples, CONCURRENCY)],
        CAPTIONS[DOORS]: _door_lines(samples),
    }
    return {caption: lines for caption, lines in found.items() if lines}


def refusals_of(samples: Sequence[Sample]) -> list[str]:
    """What was not measured, and why, a sentence each; what the run had no time for is counted."""
    refused = [s for s in samples if "why" in s]
    found = [f"{s['part']}, {s['row']}, {s['clients']} clients: {s['why']}" for s in refused if s["why"] != OUT_OF_TIME]
    n_late = sum(s["why"] == OUT_OF_TIME for s in refused)
    return [*dict.fromkeys(found), *([f"{n_late} loads: {OUT_OF_TIME}"] if n_late else [])]


def targets_of(samples: Sequence[Sample]) -> list[Target]:
    """The aims that the samples say something about."""
    return [*_memory_targets(_ordered(samples, MEMORY)), *_door_targets(_door_lines(samples))]


def _ordered(samples: Sequence[Sample], part: str) -> list[Sample]:
    """Measured ones in the order of the rows."""
    rows = list(ROWS)
    mine = [s for s in samples if s["part"] == part and "why" not in s]
    return sorted(mine, key=lambda s: (rows.index(s["row"]), s["clients"]))


def _line(sample: Sample) -> Line:
    first, gaps = sample["first_token_s"], sample["between_tokens_ms"]
    return {
        "row": sample["row"],
        "cache": ROWS[sample["row"]].cache,
        "clients": sample["clients"],
        "tokens_per_s": sample["tokens_per_s"],
        "requests_per_s": sample["requests_per_s"],
        "first_token_p50_s": first["p50"],
        "first_token_p95_s": first["p95"],
        "between_p50_ms": gaps["p50"],
        "between_p95_ms": gaps["p95"],
        "between_p99_ms": gaps["p99"],
        "peak_mib": sample["peak_mib"],
    }


def _memory_line(sample: Sample) -> Line:
    line = _line(sample)
    del line["clients"]
    return line | {"answering_at_once": sample["at_once"], "right": f"{sample['right']} of {sample['asked']}"}


def _door_lines(samples: Sequence[Sample]) -> list[Line]:
    """Medians over the rounds, and the median of the ratios of the rounds to the engine in process."""
    mine = [s for s in samples if s["part"] == DOORS and "why" not in s]
    lines = []
    for n in sorted({s["clients"] for s in mine}):
        of_process = {s["round"]: s for s in mine if (s["row"], s["clients"]) == (IN_PROCESS, n)}
        for door in (IN_PROCESS, HTTP, TRITON):
            found = [s for s in mine if (s["row"], s["clients"]) == (door, n) and s["round"] in of_process]
            if found:
                lines.append({"door": door, "clients": n, "rounds": len(found)} | _door_numbers(found, of_process))
    return lines


def _door_numbers(found: Sequence[Sample], of_process: dict[Any, Sample]) -> Line:
    ratios = [s["seconds"] / of_process[s["round"]]["seconds"] for s in found]
    return {
        "tokens_per_s": rounded(np.median([s["tokens_per_s"] for s in found])),
        "first_token_p50_s": rounded(np.median([s["first_token_s"]["p50"] for s in found])),
        "between_p50_ms": rounded(np.median([s["between_tokens_ms"]["p50"] for s in found])),
        "time_to_in_process": rounded(np.median(ratios)),
        "from_to": f"{min(ratios):.2f} to {max(ratios):.2f}",
    }


def _memory_targets(samples: Sequence[Sample]) -> list[Target]:
    """Ours that answers most per second, beside the best of the others, and by how many of both are right."""
    ours = [s for s in samples if ROWS[s["row"]].is_ours]
    others = [s for s in samples if not ROWS[s["row"]].is_ours]
    if not ours or not others:
        return []
    mine = max(ours, key=lambda s: s["tokens_per_s"])
    fastest = max(others, key=lambda s: s["tokens_per_s"])
    rival = max((s for s in others if s["right"] >= mine["right"]), key=lambda s: s["tokens_per_s"], default=None)
    targets = [
        Target(
            what=f"{mine['clients']} clients in equal memory, {TIMES:g} times the throughput: {_told(other)} / {_told(mine)}",
            measured=_ratio(other["tokens_per_s"], mine["tokens_per_s"]),
            limit=round(1 / TIMES, 4),
        )
        for other in ([fastest] if rival in (None, fastest) else [fastest, rival])
    ]
    most = max(others, key=lambda s: s["right"])
    what = f"as many right answers: {most['row']} {most['right']} / {mine['row']} {mine['right']} of {mine['asked']}"
    return [*targets, Target(what=what, measured=_ratio(most["right"], max(mine["right"], 0.5)), limit=1.0)]


def _told(sample: Sample) -> str:
    return f"{sample['row']} {sample['tokens_per_s']} tokens/s ({sample['right']} right)"


def _door_targets(lines: Sequence[Line]) -> list[Target]:
    return [
        Target(
            what=f"{line['door']}, {line['clients']} clients: time / the engine's in process",
            measured=line["time_to_in_process"],
            limit=1 + COST_PERCENT / 100,
        )
        for line in lines
        if line["door"] == TRITON
    ]


def _ratio(a: float, b: float) -> float:
    return float(f"{a / b:.3g}")
