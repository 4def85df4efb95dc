"""The measured part on serving in benchmarks/README.md: ``python -m benchmarks.serving.docs`` makes it from the results."""

from pathlib import Path

from benchmarks.harness import load, markdown_tables, replace_section

ROOT = Path(__file__).parents[2]
README = ROOT / "benchmarks" / "README.md"
RESULTS = ROOT / "benchmarks" / "results" / "serving_core.json"
BEGIN, END = "<!-- serving: begin -->\n", "<!-- serving: end -->\n"


def measured_section() -> str:
    """The text between the two markers, markers included."""
    document = load(RESULTS)
    machine = document["machine"]
    intro = (
        f"{document['date'][:10]}, {machine['cores']} cores of {machine['cpu']}, "
        f"{machine['cores_used_by_others']} of them used by other work meanwhile."
    )
    promises = [
        f"* {'met' if target['is_met'] else '**missed**'}: {target['what']}: {target['measured']} (at most {target['limit']})\n"
        for target in document["targets"]
    ]
    return "\n".join([f"{BEGIN}{intro}\n", *markdown_tables(document), "".join(promises), END])


def main() -> None:
    """Replace the section in the file."""
    replace_section(README, BEGIN, END, measured_section())


if __name__ == "__main__":
    main()
