"""What is kept of a served load: numbers, not tokens."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks.harness import rounded
from benchmarks.serving_peers.loads import Reply
from benchmarks.serving_peers.prompts import Prompt

Sample = dict[str, Any]
OUT_OF_TIME = "the time that the run was given was over"


def key_of(part: str, row: str, n_clients: int, index: int) -> Sample:
    """The fields that every sample begins with. ``part``: which of the measurements it belongs to."""
    return {"part": part, "row": row, "clients": n_clients, "round": index}


def is_same(sample: Sample, key: Sample) -> bool:
    """Whether the sample begins with these fields."""
    return all(sample[name] == value for name, value in key.items())


def summary(replies: Sequence[Reply], prompts: Sequence[Prompt]) -> Sample:
    """Throughput from the first request to the last token, and percentiles over all requests and all gaps between tokens.

    ``at_once``: the most requests that were between their first and last tokens. ``right``: answers that begin with what was
    asked for, of ``asked``. No percentiles if there is an answer without text.
    """
    why = next((reply.why for reply in replies if reply.why), None)
    if why is not None:
        return {"why": f"{sum(bool(reply.why) for reply in replies)} of {len(replies)} requests: {why}"}
    end_s = max(reply.token_s[-1] if reply.token_s else reply.ended_s or 0.0 for reply in replies)
    seen = replies if all(reply.token_s for reply in replies) else ()
    n_tokens = sum(reply.n_tokens for reply in replies)
    first_s = [reply.token_s[0] - reply.sent_s for reply in seen]
    gaps_ms = [gap for reply in seen for gap in np.diff(reply.token_s) * 1e3]
    asked = [(prompt.answer, reply.text) for prompt, reply in zip(prompts, replies, strict=True) if prompt.answer is not None]
    return {
        "requests": len(replies),
        "seconds": rounded(end_s),
        "tokens_per_s": rounded(n_tokens / end_s),
        "requests_per_s": rounded(len(replies) / end_s),
        "prompt_tokens": sum(len(prompt.token_ids) for prompt in prompts),
        "first_token_s": _percentiles(first_s, (50, 95)),
        "between_tokens_ms": _percentiles(gaps_ms, (50, 95, 99)),
        "at_once": _at_once(seen),
        "asked": len(asked),
        "right": sum(text.strip().startswith(answer) for answer, text in asked),
    }


def _percentiles(values: Sequence[float], which: Sequence[int]) -> dict[str, float | None]:
    if not values:
        return {f"p{one}": None for one in which}
    return {f"p{one}": rounded(value) for one, value in zip(which, np.percentile(values, which), strict=True)}


def _at_once(replies: Sequence[Reply]) -> int:
    """A request that was preempted counts, too: clients cannot tell."""
    changes = [(reply.token_s[0], 1) for reply in replies] + [(reply.token_s[-1], -1) for reply in replies]
    n_now, most = 0, 0
    for _, change in sorted(changes):
        n_now += change
        most = max(most, n_now)
    return most
