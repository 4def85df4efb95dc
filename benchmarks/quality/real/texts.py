"""Plain text: how likely a policy finds what comes next, after a prompt of prose."""

from random import Random

from benchmarks.quality.real.asking import Asker
from benchmarks.quality.real.haystack import prose_from


def text(asker: Asker, n_tokens: int, n_expected: int, number: int) -> tuple[list[int], list[int]]:
    """A prompt of ``n_tokens`` tokens, and the next ``n_expected`` ones."""
    sentences = prose_from(Random(f"text {n_tokens} {number}"), n_tokens)
    ids = asker.encode(" ".join(sentences))
    return ids[:n_tokens], ids[n_tokens : n_tokens + n_expected]
