"""The measured part of docs/kvpress.md, from the results file: ``python -m benchmarks.kvpress.docs`` updates it."""

from pathlib import Path

from benchmarks.harness import load, markdown_tables, replace_section

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
    return "\n".join([f"{BEGIN}{intro}\n", *markdown_tables(document), END])


def main() -> None:
    """Replace the section in the file."""
    replace_section(DOCS, BEGIN, END, measured_section())


if __name__ == "__main__":
    main()
