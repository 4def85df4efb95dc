"""The result of a request: its text and tokens, why it ended, and when what happened."""

import time
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "error", "timeout", "cancelled"]


@dataclass(kw_only=True)
class RequestTimes:
    """Timestamps of a request, in seconds of ``time.monotonic``; None: not reached yet. ``prompt_s`` and ``decode_s``: the
    request's share of the time of its prefill and decode steps, in seconds.
    """

    arrived: float = field(default_factory=time.monotonic)
    admitted: float | None = None
    tokens: list[float] = field(default_factory=list)
    """Timestamp of each generated token."""
    prompt_s: float = 0.0
    decode_s: float = 0.0

    @property
    def to_first_token_s(self) -> float | None:
        return self.tokens[0] - self.arrived if self.tokens else None


@dataclass(frozen=True, kw_only=True)
class TokenLogprob:
    """A generated token's log-probability, and those of the likeliest tokens in its place, as (token id, log-probability)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, kw_only=True)
class RequestRecall:
    """What one request recalled from a cache on the host: the bytes that were copied for it, 0 if pages are read where they
    are, and the share of its (layer, token, KV head) triples in which the pages were chosen again because the query drifted.
    """

    moved_bytes: int
    correction_rate: float


@dataclass(frozen=True, kw_only=True)
class Generation:
    """Result of a request: ``text``, without the prompt, and its ``token_ids``, without the one that ended it.

    ``kv_tokens``: per layer, how many of its ``num_computed_tokens`` (prompt and generated ones) were held at the end, in the
    cache, or in the working set if the cache is on the host; if KV heads have budgets of their own, per layer and KV head (head
    k of layer l is l * K + k). ``finish_reason``: "stop" (end of sequence, or a stop text),
    "length" (``max_new_tokens``, or the model's positions), "timeout", "cancelled", or "error", with the ``error`` that
    ended the request. ``seed``: the seed of its random numbers. ``logprobs``: of each token, if ``top_logprobs`` asks for them.
    ``others``: the second and later samples of the prompt, if ``n`` asks for them. ``recall``: None if the cache is not on the
    host, or its device keeps no counts. ``n_cached_tokens``: prompt tokens that were not computed again,
    because an earlier prompt began with them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    n_prompt_tokens: int
    num_computed_tokens: int
    kv_tokens: tuple[int, ...]
    error: Exception | None = None
    seed: int = field(default=0, compare=False)
    times: RequestTimes = field(default_factory=RequestTimes, compare=False)
    logprobs: tuple[TokenLogprob, ...] = ()
    others: tuple["Generation", ...] = ()
    recall: RequestRecall | None = field(default=None, compare=False)
    n_cached_tokens: int = field(default=0, compare=False)

    @property
    def samples(self) -> tuple["Generation", ...]:
        """All samples of the prompt: this one and ``others``."""
        return (self, *self.others)
