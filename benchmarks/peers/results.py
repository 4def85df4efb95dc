"""From samples to tables: one line per row and context, with its roofline."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import Row as Line
from benchmarks.harness import rounded
from benchmarks.peers.rows import ROWS

MIB = 2**20
Sample = dict[str, Any]


def bandwidth_of(samples: Sequence[Sample], subject: str) -> float | None:
    """10^9 bytes per second: the median of the probes of all rounds."""
    found = [s["gb_per_s"] for s in samples if "gb_per_s" in s and s["subject"] == subject]
    return float(np.median(found)) if found else None


def lines_of(samples: Sequence[Sample], subject: str) -> list[Line]:
    """A line for each context and row of a model that was measured or refused, contexts in ascending order."""
    mine = [s for s in samples if s["subject"] == subject and s["row"] in ROWS and s["round"] not in ("loading", "synthetic")]
    contexts = sorted({s["context"] for s in mine})
    return [
        _line(row, context, found, bandwidth_of(samples, subject))
        for context in contexts
        for row in ROWS
        if (found := [s for s in mine if (s["row"], s["context"]) == (row, context)])
    ]


def _line(name: str, context: int, samples: Sequence[Sample], gb_per_s: float | None) -> Line:
    """Medians over all tokens of all rounds. ``roofline``: bytes that a step must read / bandwidth."""
    row = ROWS[name]
    timed = [s for s in samples if "token_ms" in s]
    refused = next((s["why"] for s in samples if "why" in s), None)
    line: Line = {
        "context_tokens": context,
        "row": name,
        "weights": row.weights,
        "cache": row.cache,
        **dict.fromkeys(("ms_per_token", "p10_ms", "p90_ms", "prompt_tokens_per_s", "first_token_s", "peak_mib")),
        **dict.fromkeys(("joules_per_token", "read_mib_per_token", "roofline_ms", "of_roofline", "busy_cores")),
        "note": refused if not timed else "",
    }
    if not timed:
        return line
    token_ms = np.concatenate([s["token_ms"] for s in timed])
    p10, median, p90 = np.percentile(token_ms, [10, 50, 90])
    read = timed[-1]["weight_bytes"] + (timed[-1]["kv_bytes"] or 0)
    line |= {"ms_per_token": rounded(median), "p10_ms": rounded(p10), "p90_ms": rounded(p90)}
    line |= {
        "peak_mib": round(max(s["peak_bytes"] for s in timed) / MIB),
        "read_mib_per_token": rounded(read / MIB),
        "busy_cores": rounded(np.median([s["cores"] for s in timed])),
    }
    if gb_per_s is not None:
        roofline = read / gb_per_s / 1e6
        line |= {"roofline_ms": rounded(roofline), "of_roofline": rounded(median / roofline)}
    first = [s["first_token_s"] for s in timed if s["first_token_s"] is not None]
    if first:
        line |= {
            "first_token_s": rounded(np.median(first)),
            "prompt_tokens_per_s": rounded(context / np.median(first)),
        }
    joules = [s["joules"] / len(s["token_ms"]) for s in timed if s["joules"] is not None]
    if joules:
        line["joules_per_token"] = rounded(np.median(joules))
    notes = ["synthetic cache"] if timed[0]["synthetic"] else []
    notes += [f"{len(timed)} rounds, then: {refused}"] if refused else []
    line["note"] = "; ".join(notes)
    return line


def synthetic_lines(samples: Sequence[Sample]) -> list[Line]:
    """What a synthetic cache is worth: the same row and context with a prompt that was read and without."""
    lines = []
    for s in samples:
        if s["round"] != "synthetic" or "token_ms" not in s:
            continue
        key = (s["subject"], s["row"], s["context"])
        real = [r for r in samples if "token_ms" in r and (r["subject"], r["row"], r["context"]) == key and r is not s]
        if real:
            read = float(np.median(np.concatenate([r["token_ms"] for r in real])))
            placed = float(np.median(s["token_ms"]))
            lines.append(
                {
                    "model": s["subject"],
                    "row": s["row"],
                    "context_tokens": s["context"],
                    "after_a_prompt_ms": rounded(read),
                    "synthetic_ms": rounded(placed),
                    "ratio": rounded(placed / read),
                }
            )
    return lines


def loading_lines(samples: Sequence[Sample]) -> list[Line]:
    """Seconds until each row was ready, the median over its contexts, and what ran it."""
    lines = []
    for subject in dict.fromkeys(s["subject"] for s in samples):
        for row in ROWS:
            loads = [s for s in samples if (s["subject"], s["row"], s["round"]) == (subject, row, "loading")]
            if loads:
                facts = ", ".join(f"{k} {v}" for k, v in loads[-1]["facts"].items() if k in ("version", "backend", "torch"))
                seconds = rounded(np.median([s["load_s"] for s in loads]))
                lines.append({"model": subject, "row": row, "load_s": seconds, "ran_with": facts})
    return lines
