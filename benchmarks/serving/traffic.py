"""Request arrivals, and the latencies that clients observe."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.models import random_tokens
from trt_kv.runtime.request import Request
from trt_kv.runtime.sampling import SamplingParams


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Numbers of tokens, log-normal around ``median`` with ``sigma``, within ``least`` and ``most``."""

    median: int
    sigma: float
    least: int
    most: int

    def draw(self, rng: np.random.Generator, n: int) -> list[int]:
        drawn = rng.lognormal(math.log(self.median), self.sigma, size=n)
        return [int(length) for length in np.clip(drawn, self.least, self.most)]


@dataclass(frozen=True, kw_only=True)
class Mix:
    """Length distributions of prompts and answers."""

    name: str
    prompt: Lengths
    answer: Lengths


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """A request that arrives ``at_s`` seconds after the start, for exactly ``n_new`` tokens."""

    at_s: float
    prompt_ids: Sequence[int]
    n_new: int

    def request(self, start: float) -> Request:
        """The request in a run that began at ``start`` of ``time.monotonic``: greedy, without early end."""
        made = request_of(self.prompt_ids, self.n_new)
        made.times.arrived = start + self.at_s
        return made


def request_of(prompt_ids: Sequence[int], n_new: int) -> Request:
    """A greedy request for exactly ``n_new`` tokens, without text."""
    params = SamplingParams(max_new_tokens=n_new, seed=0)
    return Request(prompt_ids=prompt_ids, params=params, tokenizer=None, eos_token_ids=(), limit=n_new)


def poisson(mix: Mix, n: int, *, per_second: float, vocab_size: int, seed: int) -> list[Arrival]:
    """``n`` arrivals of a Poisson process, or all at once if ``per_second`` is infinite."""
    rng = np.random.default_rng(seed)
    at = np.cumsum(rng.exponential(1.0, size=n) / per_second)
    lengths = zip(mix.prompt.draw(rng, n), mix.answer.draw(rng, n), strict=True)
    return [
        Arrival(at_s=float(at_s), prompt_ids=random_tokens(n_prompt, vocab_size, seed=1000 * seed + index), n_new=n_new)
        for index, (at_s, (n_prompt, n_new)) in enumerate(zip(at, lengths, strict=True))
    ]


@dataclass(frozen=True, kw_only=True)
class Served:
    """Requests that have all ended, and the number of steps in which they were decoded."""

    requests: Sequence[Request]
    decode_steps: int

    @property
    def makespan_s(self) -> float:
        """Seconds from the first arrival to the last token."""
        return max(r.times.tokens[-1] for r in self.requests) - min(r.times.arrived for r in self.requests)

    def measures(self) -> Mapping[str, float]:
        """Throughput, and medians and 95th percentiles of pooled times between tokens (ITL), of each request's mean time per
        token after the first (TPOT), and of the times to first token (TTFT).
        """
        tokens = [np.array(request.times.tokens) for request in self.requests]
        between_ms = np.concatenate([np.diff(times) for times in tokens]) * 1e3
        per_token_ms = np.array([(times[-1] - times[0]) / (len(times) - 1) for times in tokens if len(times) > 1]) * 1e3
        first_ms = np.array([request.times.to_first_token_s for request in self.requests], np.float64) * 1e3
        n_tokens = sum(map(len, tokens))
        return {
            "tokens_per_s": n_tokens / self.makespan_s,
            "sequences_per_step": (n_tokens - len(tokens)) / self.decode_steps,
            "between_tokens_p50_ms": float(np.percentile(between_ms, 50)),
            "between_tokens_p95_ms": float(np.percentile(between_ms, 95)),
            "mean_between_tokens_p95_ms": float(np.percentile(per_token_ms, 95)),
            "first_token_p50_ms": float(np.percentile(first_ms, 50)),
            "first_token_p95_ms": float(np.percentile(first_ms, 95)),
        }


def sleep_until(moment: float) -> None:
    """Sleep until ``moment`` of ``time.monotonic``."""
    time.sleep(max(0.0, moment - time.monotonic()))
