"""The measured part of ``README.md`` in this folder, made from the results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import Row as Line
from benchmarks.harness import replace_section
from benchmarks.peers.rows import ROWS
from benchmarks.peers.subjects import TITLES

PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
_PIVOTS = {
    "ms_per_token": "ms per decoded token: median (10th to 90th percentile of tokens); \\* synthetic cache",
    "of_roofline": "time per token / roofline",
    "prompt_tokens_per_s": "prompt tokens per second",
    "first_token_s": "seconds to the first token",
    "peak_mib": "peak resident memory, MiB",
    "joules_per_token": "joules per token",
}


def write_page(document: Mapping[str, Any], page: Path = PAGE) -> None:
    """Replace the measured part by that of a document with tables."""
    replace_section(page, BEGIN, END, section(document))


def section(document: Mapping[str, Any]) -> str:
    """The text between the markers, markers included."""
    machine, plan = document["machine"], document["settings"]
    others = machine.get("cores_used_by_others", "an unknown number")
    intro = (
        f"{document['date'][:10]}, {machine['cores']} cores of {machine['cpu']}, {others} of them used by other work. "
        f"{plan['threads']} threads each, {plan['rounds']} rounds of {plan['n_tokens']} tokens; the run took "
        f"{document['elapsed_s'] / 60:.0f} minutes."
    )
    parts = [f"{BEGIN}{intro}\n"]
    for caption, lines in document["tables"].items():
        if caption in TITLES.values():
            parts += [f"### {caption[0].upper()}{caption[1:]}\n", *_pivots(lines), _refusals(lines)]
        else:
            parts.append(
                f"**{caption[0].upper()}{caption[1:]}**\n\n{_table(list(lines[0]), [list(line.values()) for line in lines])}"
            )
    aims = [
        f"* {'met' if aim['is_met'] else '**missed**'}: {aim['what']}: {aim['measured']:g} (at most {aim['limit']:g})\n"
        for aim in document["targets"]
    ]
    return "\n".join([*parts, "### Aims\n", "".join(aims) or "Nothing was measured that they speak of.\n", END])


def _pivots(lines: Sequence[Line]) -> list[str]:
    contexts = sorted({line["context_tokens"] for line in lines})
    rows = list(dict.fromkeys(line["row"] for line in lines if line["ms_per_token"] is not None))
    at = {(line["row"], line["context_tokens"]): line for line in lines}
    parts = []
    for column, caption in _PIVOTS.items():
        cells = [[row, *(_cell(at.get((row, context)), column) for context in contexts)] for row in rows]
        if any(cell for line in cells for cell in line[1:]):
            parts.append(f"**{caption}**\n\n{_table(['', *map(str, contexts)], cells)}")
    return parts


def _cell(line: Line | None, column: str) -> str:
    if line is None or line[column] is None:
        return ""
    if column != "ms_per_token":
        return f"{line[column]:g}"
    mark = "\\*" if "synthetic" in line["note"] else ""
    return f"{line[column]:g}{mark} ({line['p10_ms']:g} to {line['p90_ms']:g})"


def _refusals(lines: Sequence[Line]) -> str:
    """Why rows were not measured, one line for each reason."""
    reasons: dict[tuple[str, str], list[int]] = {}
    for line in lines:
        if line["ms_per_token"] is None:
            reasons.setdefault((line["row"], line["note"]), []).append(line["context_tokens"])
    text = [f"* {row}, {', '.join(map(str, at))} tokens: {why}\n" for (row, why), at in reasons.items() if row in ROWS]
    return f"Not measured:\n\n{''.join(text)}" if text else ""


def _table(head: Sequence[str], cells: Sequence[Sequence[object]]) -> str:
    lines = [[word.replace("_", " ") for word in head], ["---"] * len(head), *cells]
    return "".join(f"| {' | '.join('' if cell is None else str(cell) for cell in line)} |\n" for line in lines)
