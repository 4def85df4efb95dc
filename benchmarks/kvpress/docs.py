"""The measured part of docs/kvpress.md, from the results file: ``python -m benchmarks.kvpress.docs`` updates it."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import load

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs" / "kvpress.md"
RESULTS = ROOT / "benchmarks" / "results" / "kvpress_overlap.json"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def measured_section() -> str:
    """The text between the two markers, markers included."""
    document = load(RESULTS)
    settings = document["settings"]
    *lengths, last = settings["prompt_tokens"]
    intro = (
        f"kvpress {settings['kvpress']} on transformers {settings['transformers']}; the bundled model, prompts of "
        f"{', '.join(map(str, lengths))} and {last} tokens. Tokens are means over prompts, layers and KV heads."
    )
    tables = [f"**{caption[0].upper()}{caption[1:]}**\n\n{_table(rows)}" for caption, rows in document["tables"].items()]
    return "\n".join([f"{BEGIN}{intro}\n", *tables, END])


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown; the columns are named as in the results file, with spaces."""
    head = [column.replace("_", " ") for column in rows[0]]
    lines = [head, ["---"] * len(head), *(map(str, row.values()) for row in rows)]
    return "".join(_line(cells) for cells in lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Replace the section in the file."""
    text = DOCS.read_text()
    section = measured_section()
    DOCS.write_text(re.sub(f"{BEGIN}.*{END}", lambda _: section, text, flags=re.DOTALL))


if __name__ == "__main__":
    main()
