"""What the project aims at beside its peers, each met or missed by the lines of a run.

Peers are compared by their whole caches: their own evictions are lines of the tables. Where no peer was measured at a context,
its best possible time stands in for it: the least bytes that any of them must read, at the measured bandwidth.
"""

from collections.abc import Iterable, Sequence

from benchmarks.harness import Row as Line
from benchmarks.harness import Target
from benchmarks.peers.rows import OURS, ROWS

FASTER = {8192: 2.0, 32768: 5.0, 131072: 15.0}
"""How many times faster than the best peer a step over a part of the cache is to be."""
FLAT, OF_ROOFLINE, OF_MEMORY = 1.15, 1.3, 1.1
MOST_MIB = 2048
NEAR = 256
"""Contexts are a little shorter where prompt and answer together fill the model's positions."""


def targets_of(title: str, lines: Sequence[Line], *, with_memory: bool) -> list[Target]:
    """All aims that the lines of one model say something about, those for memory if ``with_memory``."""
    timed = [line for line in lines if line["ms_per_token"] is not None]
    contexts = sorted({line["context_tokens"] for line in timed})
    found: list[Target] = []
    for context in contexts:
        at = [line for line in timed if line["context_tokens"] == context]
        ours = [line for line in at if _is_ours(line)]
        peers = [line for line in at if not _is_ours(line) and not ROWS[line["row"]].drops]
        found += _full(title, context, [line for line in ours if _is(line, "full", "int4")], peers)
        for policy in ("pooledwindow", "freekv"):
            found += _part(title, context, [line for line in ours if _is(line, policy)], peers, lines)
    found += _flat(title, [line for line in timed if _is(line, "freekv", "int4")])
    found += _rooflines(title, [line for line in timed if _is_ours(line)])
    return found + (_memory(title, [line for line in timed if _is_ours(line)]) if with_memory else [])


def _is_ours(line: Line) -> bool:
    return ROWS[line["row"]].engine == OURS


def _is(line: Line, policy: str, weights: str | None = None) -> bool:
    return line["row"].startswith(f"{OURS} {policy}") and weights in (None, line["weights"])


def _best(lines: Iterable[Line], column: str, *, most: bool = False) -> Line | None:
    lines = [line for line in lines if line[column] is not None]
    return (max if most else min)(lines, key=lambda line: line[column], default=None)


def _full(title: str, context: int, ours: Sequence[Line], peers: Sequence[Line]) -> list[Target]:
    """Aim 1."""
    targets = []
    mine, peer = _best(ours, "ms_per_token"), _best(peers, "ms_per_token")
    if mine and peer:
        what = f"1. {title}, {context} tokens, whole cache, ms per token: {mine['row']} {mine['ms_per_token']} / "
        what += f"{peer['row']} {peer['ms_per_token']}"
        targets.append(Target(what=what, measured=_ratio(mine["ms_per_token"], peer["ms_per_token"]), limit=1.0))
    column = "prompt_tokens_per_s"
    mine, peer = _best(ours, column, most=True), _best(peers, column, most=True)
    if mine and peer:
        what = f"1. {title}, {context} tokens, time to read them: {peer['row']} {peer[column]} tokens per s / "
        what += f"{mine['row']} {mine[column]}"
        targets.append(Target(what=what, measured=_ratio(peer[column], mine[column]), limit=1.0))
    return targets


def _part(title: str, context: int, ours: Sequence[Line], peers: Sequence[Line], lines: Sequence[Line]) -> list[Target]:
    """Aim 2: a part of the cache beside the whole one of the best peer."""
    times = next((times for at, times in FASTER.items() if 0 <= at - context <= NEAR), None)
    mine, peer = _best(ours, "ms_per_token"), _best(peers, "ms_per_token")
    if times is None or mine is None:
        return []
    if peer is not None:
        against, other_ms = f"{peer['row']} {peer['ms_per_token']}", float(peer["ms_per_token"])
    else:
        bound = _least_ms(context, mine, lines)
        if bound is None:
            return []
        against, other_ms = f"the least that a peer could need, none was measured: {bound:.1f}", bound
    what = f"2. {title}, {context} tokens, {times:g} times faster: {mine['row']} {mine['ms_per_token']} ms / {against}"
    return [Target(what=what, measured=_ratio(mine["ms_per_token"], other_ms), limit=round(1 / times, 4))]


def _least_ms(context: int, mine: Line, lines: Sequence[Line]) -> float | None:
    """The bytes that a peer read at the longest context at which it was measured, its cache grown to this one, at the bandwidth
    of this context.
    """
    peers = [line for line in lines if not _is_ours(line) and not ROWS[line["row"]].drops and line["ms_per_token"] is not None]
    by_row: dict[str, list[Line]] = {}
    for line in peers:
        by_row.setdefault(line["row"], []).append(line)
    grown = []
    for found in by_row.values():
        if len(found) >= 2:
            low, high = found[0], found[-1]
            slope = (high["read_mib_per_token"] - low["read_mib_per_token"]) / (high["context_tokens"] - low["context_tokens"])
            grown.append(high["read_mib_per_token"] + slope * (context - high["context_tokens"]))
    if not grown or mine["roofline_ms"] is None:
        return None
    return float(min(grown) * mine["roofline_ms"] / mine["read_mib_per_token"])


def _flat(title: str, lines: Sequence[Line]) -> list[Target]:
    targets = []
    for row in dict.fromkeys(line["row"] for line in lines):
        times = {
            n: line["ms_per_token"] for line in lines if line["row"] == row and (n := line["context_tokens"]) > 8192 - NEAR
        }
        if len(times) > 1:
            what = f"2. {title}, {row}, ms per token from {min(times)} tokens on: the most / the least"
            targets.append(Target(what=what, measured=_ratio(max(times.values()), min(times.values())), limit=FLAT))
    return targets


def _rooflines(title: str, lines: Sequence[Line]) -> list[Target]:
    targets = []
    for row in dict.fromkeys(line["row"] for line in lines):
        worst = _best((line for line in lines if line["row"] == row), "of_roofline", most=True)
        if worst is not None:
            what = f"2. {title}, {row}: ms per token / its roofline, at worst, at {worst['context_tokens']} tokens"
            targets.append(Target(what=what, measured=worst["of_roofline"], limit=OF_ROOFLINE))
    return targets


def _memory(title: str, lines: Sequence[Line]) -> list[Target]:
    """Aim 3, of int4 weights. What a step reads is weights and budget, except with a cache in RAM that is read in part."""
    targets = []
    for line in (line for line in lines if line["weights"] == "int4"):
        if line["context_tokens"] == 32768 and not line["row"].endswith("RAM"):
            what = f"3. {title}, {line['row']}, 32768 tokens: peak memory {line['peak_mib']} MiB / weights and budget"
            targets.append(Target(what=what, measured=_ratio(line["peak_mib"], line["read_mib_per_token"]), limit=OF_MEMORY))
        if line["context_tokens"] == 131072 and line["row"].endswith("file"):
            what = f"3. {title}, {line['row']}, 131072 tokens: peak memory, MiB"
            targets.append(Target(what=what, measured=float(line["peak_mib"]), limit=MOST_MIB))
    return targets


def _ratio(a: float, b: float) -> float:
    return float(f"{a / b:.3g}")
