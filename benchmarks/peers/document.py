"""The results file: as ``benchmarks.harness`` writes them, and all samples, so that tables can be made again from it."""

import dataclasses
from typing import Any

from benchmarks.harness import begun_document
from benchmarks.peers.aims import targets_of
from benchmarks.peers.measure import Plan
from benchmarks.peers.results import lines_of, loading_lines, synthetic_lines
from benchmarks.peers.subjects import OF_MEMORY_AIMS, TITLES


def begun(plan: Plan) -> dict[str, Any]:
    """A document without results."""
    return begun_document("The engine beside other engines, on one machine, in turn", dataclasses.asdict(plan))


def with_tables(document: dict[str, Any]) -> dict[str, Any]:
    """The document with tables and aims made from its samples."""
    samples = document["samples"]
    subjects = list(dict.fromkeys(sample["subject"] for sample in samples))
    lines = {subject: lines_of(samples, subject) for subject in subjects}
    tables = {TITLES[subject]: found for subject, found in lines.items()}
    tables |= {"synthetic caches beside prompts that were read": synthetic_lines(samples), "loading": loading_lines(samples)}
    targets = [
        target
        for subject, found in lines.items()
        for target in targets_of(TITLES[subject], found, with_memory=subject == OF_MEMORY_AIMS)
    ]
    return document | {
        "tables": {caption: rows for caption, rows in tables.items() if rows},
        "targets": [{**dataclasses.asdict(target), "is_met": target.is_met} for target in targets],
    }
