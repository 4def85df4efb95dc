"""Next-token choice: greedy, or temperature with top-k and nucleus (top-p, arXiv 1904.09751) filtering."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from trt_kv.errors import UsageError
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.arguments import is_integer, is_number


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request. ``temperature`` 0 is greedy; ``top_k`` 0 and ``top_p`` 1 filter nothing.

    ``stop``: one or several strings that end the output and are not part of it. Random numbers depend on ``seed`` alone, not on
    other requests; None: a random seed. Requests with a lower ``priority`` start first. ``timeout_s``: seconds from arrival,
    time in the queue included, after which the request ends with the tokens it has; None: never.

    ``parse_special_tokens``: special tokens that are written in a prompt's text, as chat templates write them, become control
    tokens. False, for text of users: ``<eos>`` in it is text like any other, and ends or begins nothing.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    priority: int = 0
    timeout_s: float | None = None
    parse_special_tokens: bool = True

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("max_new_tokens", is_integer(self.max_new_tokens, 1), "an integer >= 1"),
            (
                "temperature",
                is_number(self.temperature) and 0.0 <= self.temperature < float("inf"),
                "a number >= 0; 0 is greedy",
            ),
            ("top_p", is_number(self.top_p) and 0.0 < self.top_p <= 1.0, "a number in (0, 1]"),
            ("top_k", is_integer(self.top_k, 0), "an integer >= 0; 0 is no limit"),
            ("seed", self.seed is None or is_integer(self.seed, 0), "an integer >= 0, or None"),
            ("stop", _is_stop(self.stop), "a text that is not empty, or a list of such texts"),
            ("priority", is_integer(self.priority), "an integer; lower ones start first"),
            (
                "timeout_s",
                self.timeout_s is None or (is_number(self.timeout_s) and self.timeout_s > 0),
                "seconds > 0, or None",
            ),
            ("parse_special_tokens", isinstance(self.parse_special_tokens, bool), "True or False"),
        ):
            if not valid:
                raise UsageError(f"bad {name}", got=repr(getattr(self, name)), expected=expected)

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class SamplingOptions(TypedDict, total=False):
    """The fields of ``SamplingParams`` as keyword arguments."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    stop: str | Sequence[str]
    priority: int
    timeout_s: float | None
    parse_special_tokens: bool


def _is_stop(stop: object) -> bool:
    texts = [stop] if isinstance(stop, str) else stop
    return (isinstance(texts, list | tuple)) and all(isinstance(text, str) and text for text in texts)


def next_token(logits_V: Floats, params: SamplingParams, rng: np.random.Generator) -> int:
    """Sample one token id from logits [V]. Greedy sampling takes the lowest id among equal logits."""
    if params.temperature == 0.0:
        return int(np.argmax(logits_V))
    order = np.argsort(-logits_V, kind="stable")
    if params.top_k:
        order = order[: params.top_k]
    with np.errstate(over="ignore"):
        scaled = (logits_V[order].astype(np.float64) - logits_V[order[0]]) / params.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    nucleus = np.cumsum(probabilities) - probabilities < params.top_p
    probabilities = np.where(nucleus, probabilities, 0.0)
    return int(rng.choice(order, p=probabilities / probabilities.sum()))


def log_probability(logits_V: Floats, token_id: int) -> float:
    """Log-probability of a token under logits [V]."""
    shifted_V = logits_V.astype(np.float64) - logits_V.max()
    return float(shifted_V[token_id] - np.log(np.exp(shifted_V).sum()))
