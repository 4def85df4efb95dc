"""Marks of answers, between 0 and 1."""

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.quality.real.items import Item

WITHOUT_KEY, WRONG_VALUE = 0.5, 0.25
"""What an object loses of its point for each key that is missing, and for each value that is wrong (Text2JSON)."""


def mark(item: Item, text: str) -> float:
    """The mark of an answer."""
    return records_found(item.references, text) if item.marking == "records" else share_found(item.references, text)


def share_found(references: Sequence[str], text: str) -> float:
    """The share of the references that the answer contains, in any case (RULER, kvpress: string_match_all)."""
    lowered = text.lower()
    return sum(reference.lower() in lowered for reference in references) / len(references)


def records_found(references: Sequence[str], text: str) -> float:
    """Points over the number of gold or predicted names, which counts what was left out and what was invented (Text2JSON).

    ``references``: the gold objects as JSON, one string each, with a key "name". An answer that is not one list of objects
    gives 0. An object of a right name gives a point, less what it loses; not less than 0.
    """
    gold = {record["name"]: record for record in map(json.loads, references)}
    predicted = _records(text)
    names = gold.keys() | predicted.keys()
    points = sum(_points(gold[name], predicted[name]) for name in gold.keys() & predicted.keys())
    return points / len(names)


def _points(gold: dict[str, Any], predicted: dict[str, Any]) -> float:
    lost = 0.0
    for key in gold.keys() - {"name"}:
        lost += WITHOUT_KEY if key not in predicted else WRONG_VALUE * (str(predicted[key]) != str(gold[key]))
    return max(0.0, 1.0 - lost)


def _records(text: str) -> dict[str, dict[str, Any]]:
    """The first list of objects with a name in ``text``, by name; empty if there is none that parses."""
    start, end = text.find("["), text.find("]")
    if not 0 <= start < end:
        return {}
    try:
        found = json.loads(text[start : end + 1])
    except ValueError:
        return {}
    return {str(record["name"]): record for record in found if isinstance(record, dict) and "name" in record}
