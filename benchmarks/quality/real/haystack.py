"""Text for facts to be lost in: prose of Python's own documentation, which every installation has, and filler sentences."""

import re
from functools import cache
from pydoc_data import topics
from random import Random

FILLER = (
    "The meadow is wide.",
    "The river is calm.",
    "The morning is cold.",
    "Let us walk on.",
    "Up the hill and down once more.",
)
"""Five short sentences that are repeated, as in RULER's "noise" haystack."""
_SENTENCE = re.compile(r"(?<=[.!?]) +(?=[A-Z\"])")
_PLAIN = re.compile(r"[A-Z][A-Za-z0-9 ,;:'()\"_.-]*[.]")


@cache
def prose() -> tuple[str, ...]:
    """The sentences of Python's language reference that read as prose: no grammar, code or tables, in order of the topics.

    They depend on the version of Python, so results are compared only within one.
    """
    found: dict[str, None] = {}
    for name in sorted(topics.topics):
        for paragraph in topics.topics[name].split("\n\n"):
            lines = paragraph.split("\n")
            if any(line.startswith((" ", "*", "=")) for line in lines) or len(lines) < 2:
                continue
            for sentence in _SENTENCE.split(" ".join(lines)):
                if _PLAIN.fullmatch(sentence) and 6 <= len(sentence.split()) <= 40:
                    found.setdefault(sentence)
    return tuple(found)


def prose_from(draw: Random, n_sentences: int) -> list[str]:
    """``n_sentences`` successive sentences from a random place on, over and over."""
    sentences = prose()
    start = draw.randrange(len(sentences))
    return [sentences[(start + at) % len(sentences)] for at in range(n_sentences)]


def inserted(sentences: list[str], facts: list[str], depths: list[float]) -> list[str]:
    """``facts`` among ``sentences``, each at its depth (0 the beginning, 1 the end)."""
    placed = sorted(zip(depths, facts, strict=True), reverse=True)
    body = list(sentences)
    for depth, fact in placed:
        body.insert(round(depth * len(sentences)), fact)
    return body
