"""What the benchmark and a runner say to each other: one JSON document per line, over the runner's standard streams.

Runners are modules of ``benchmarks.peers.runners``; each runs in the virtual environment of the engine that it drives, so this
file and ``serving.py`` import the standard library alone. The first line sets a runner up (``Setup``), and it answers with
facts; then every line is a ``Job``, answered with an ``Answer``, or with the reason why there is none (``Refusal``).
"""

import dataclasses
import json
import random
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Setup:
    """``model``: file or folder. ``threads``: of everything that computes. ``context``: the most tokens of any job, prompt and
    answer. ``options``: of this runner.
    """

    model: str
    threads: int
    context: int
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """One request: ``context`` prompt tokens, chosen by ``seed``, then ``n_tokens`` generated ones, greedy, whatever they are.

    ``synthetic``: the cache is filled with random numbers in place of reading a prompt. Seeds differ between requests, so that
    no engine finds a prompt in a prefix cache.
    """

    context: int
    n_tokens: int
    seed: int
    synthetic: bool = False


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Times of one request. ``first_token_s``: from the request to its first token; None if the cache was synthetic.

    ``token_ms``: between the following tokens. ``kv_bytes``: keys, values and summaries that a step must read; None: as the row
    says. ``joules``: of the processor from the first token to the last, None if the machine does not tell.
    """

    first_token_s: float | None
    token_ms: list[float]
    kv_bytes: int | None = None
    joules: float | None = None


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a runner cannot be set up, or cannot do a job."""

    why: str


def to_line(message: Any) -> str:
    """A dataclass, or a document, as one line with its end."""
    return json.dumps(message if isinstance(message, dict) else dataclasses.asdict(message)) + "\n"


def prompt_ids(job: Job, vocab_size: int) -> list[int]:
    """Random token ids, the same for all runners.

    None of the first or last 300 (a quarter, in a small vocabulary), where special tokens are.
    """
    margin = min(300, vocab_size // 4)
    draw = random.Random(f"{job.seed} {job.context}")
    return [draw.randrange(margin, vocab_size - margin) for _ in range(job.context)]
