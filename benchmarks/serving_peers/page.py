"""The measured part of ``docs/serving.md``, made from the results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import load, markdown_tables, replace_section
from benchmarks.peers.subjects import TITLES
from benchmarks.serving_peers.loads_by_others import lines_of
from benchmarks.serving_peers.plan import CONCURRENCY, DOORS, MEMORY, SIZES, SMOLLM2
from benchmarks.serving_peers.results import CAPTIONS, refusals_of

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"


def write_page(document: Mapping[str, Any], folder: Path, page: Path = PAGE) -> None:
    """Replace the measured part by that of a document with tables, and of other runs and loads by others in the folder."""
    more = [load(path) for path in sorted(folder.glob("serving_peers_*.json"))]
    replace_section(page, BEGIN, END, section(document, lines_of(folder), more))


def section(document: Mapping[str, Any], by_others: Sequence[str] = (), more: Sequence[Mapping[str, Any]] = ()) -> str:
    """The text between the markers, markers included. ``by_others``: lines about other loads. ``more``: other runs."""
    parts = [
        f"{BEGIN}{_of_run(document)}",
        *(f"### {_title(other)}\n\n{_of_run(other)}" for other in more),
        *(["Under other loads:\n\n" + "".join(f"{line}\n" for line in by_others)] if by_others else []),
        END,
    ]
    return "\n".join(parts)


def _title(document: Mapping[str, Any]) -> str:
    """What another run is about."""
    plan = document["settings"]
    model, of = plan.get("model", SMOLLM2), SIZES[plan["sizes"]]
    if model != SMOLLM2:
        title = TITLES[model]
        return title[0].upper() + title[1:]
    return f"Contexts of {of.memory_prompt:,} tokens"


def _of_run(document: Mapping[str, Any]) -> str:
    machine, plan = document["machine"], document["settings"]
    others = machine.get("cores_used_by_others", "an unknown number")
    intro = (
        f"{document['date'][:10]}, {machine['cores']} cores of {machine['cpu']}, {others} of them used by other work. "
        f"{plan['threads']} threads each; the run took {document['elapsed_s'] / 60:.0f} minutes.\n"
    )
    texts = _texts(plan["sizes"])
    tables = [
        f"{table}\n{texts[caption]}\n" for caption, table in zip(document["tables"], markdown_tables(document), strict=True)
    ]
    missing = "".join(f"* {one}\n" for one in refusals_of(document["samples"]))
    aims = "".join(
        f"* {'met' if aim['is_met'] else '**missed**'}: {aim['what']}: {aim['measured']:g} (at most {aim['limit']:g})\n"
        for aim in document["targets"]
    )
    parts = [
        intro,
        *tables,
        *([f"Not measured:\n\n{missing}"] if missing else []),
        *([f"Aims:\n\n{aims}"] if aims else []),
    ]
    return "\n".join(parts)


def _texts(name: str) -> dict[str, str]:
    """What each table shows, by its caption."""
    of = SIZES[name]
    return {
        CAPTIONS[CONCURRENCY]: (
            f"Prompts of {of.prompt} tokens of prose, answers of {of.tokens}; of each client "
            f"{'one request' if of.requests_each == 1 else f'{of.requests_each} requests, one after the other'}."
        ),
        CAPTIONS[MEMORY]: (
            f"{of.memory_requests} prompts of {of.memory_prompt} tokens, with a fact each that their end asks for, sent by "
            f"{of.memory_clients} clients at once; answers of {of.memory_tokens} tokens. "
            f"Everybody's KV cache has {of.memory_mib} MiB."
        ),
        CAPTIONS[DOORS]: (
            f"SmolLM2 in int4, the whole cache, prompts of {of.door_prompt} tokens, answers of {of.door_tokens}; one request "
            "for each client, two for a single one. The three run in turns."
        ),
    }
