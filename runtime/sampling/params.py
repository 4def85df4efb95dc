"""Sampling parameters of a request, and their checks."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from trt_kv.errors import UsageError
from trt_kv.runtime.arguments import is_integer, is_number
from trt_kv.text_file import lone_surrogate

_LARGEST = 1e30
"""Of penalties and biases: fp32 has room for its product with a logit or a count of tokens."""
_RANGE = f"a number from {-_LARGEST:g} to {_LARGEST:g}"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling parameters of one request; the defaults are greedy, and change and filter nothing.

    **Choice.** ``temperature`` 0 is greedy. Else these are kept, in this order: the ``top_k`` likeliest tokens (0: all), the
    likeliest with a mass of ``top_p``, those with at least ``min_p`` of the highest probability, the most typical with a mass
    of ``typical_p``. Random numbers depend on ``seed`` alone, not on other requests; None: a random seed.

    **Logits**, before that and for greedy too: those of tokens in the prompt or generated are divided by ``repetition_penalty``
    if positive, and multiplied if negative (arXiv 1909.05858); ``frequency_penalty`` is subtracted for each time that a token
    was generated, ``presence_penalty`` once; ``logit_bias`` is added, by token id. ``bad_words``, texts or lists of token ids,
    are never completed.

    **End.** ``stop``: one or several strings that end the output and are not part of it; ``stop_token_ids``: tokens that do the
    same, besides the model's own, which ``ignore_eos`` disregards. Before ``min_tokens`` tokens none of these ends it.
    ``max_new_tokens`` does. ``timeout_s``: seconds from arrival, time in the queue included, after which the request ends
    with the tokens it has; None: never. Requests with a lower ``priority`` start first.

    **Samples.** ``n`` of one prompt, which is read once: ``Generation.samples``. Sample i has the seed ``seed`` + i, and the
    tokens of a request of its own with that seed. Greedy samples would all be equal, so they are refused.

    **Structure.** At most one of: ``json_schema`` (a JSON schema as a dictionary, or as text; ``{"type": "object"}`` for any
    object), ``regex``, ``grammar`` (in Lark's notation, from the rule ``start``). Tokens that the output has no place for are
    never chosen, and the output ends when it is complete. ``max_new_tokens`` may cut it short. Needs the extra ``structured``.

    **Prefix.** ``cache_salt``: requests with different salts never use each other's cached prefixes, whose effect on the time
    to the first token would tell one what another has asked.

    ``parse_special_tokens``: special tokens that are written in a prompt's text, as chat templates write them, become control
    tokens. False, for text of users: ``<eos>`` in it is text like any other, and ends or begins nothing.
    ``top_logprobs``: record the log-probability of each generated token, and of as many of the likeliest; None: of none.
    They are the model's, before all of the above. ``skip_special_tokens``: special tokens that are generated, such as those
    of tool calls, have no text.
    """

    max_new_tokens: int = 128
    n: int = 1
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad_words: Sequence[str | Sequence[int]] = ()
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    priority: int = 0
    timeout_s: float | None = None
    parse_special_tokens: bool = True
    skip_special_tokens: bool = True
    top_logprobs: int | None = None
    json_schema: Mapping[str, Any] | str | None = None
    regex: str | None = None
    grammar: str | None = None
    cache_salt: str = ""

    def __post_init__(self) -> None:
        for name, valid, expected in (
            ("max_new_tokens", is_integer(self.max_new_tokens, 1), "an integer >= 1"),
            ("n", is_integer(self.n, 1), "an integer >= 1"),
            ("temperature", _is_within(self.temperature, 0.0, math.inf), "a number >= 0; 0 is greedy"),
            ("top_p", _is_within(self.top_p, 0.0, 1.0) and self.top_p > 0.0, "a number in (0, 1]"),
            ("top_k", is_integer(self.top_k, 0), "an integer >= 0; 0 is no limit"),
            ("min_p", _is_within(self.min_p, 0.0, 1.0), "a number in [0, 1]; 0 is no limit"),
            ("typical_p", _is_within(self.typical_p, 0.0, 1.0) and self.typical_p > 0.0, "a number in (0, 1]"),
            ("seed", self.seed is None or is_integer(self.seed, 0), "an integer >= 0, or None"),
            (
                "repetition_penalty",
                _is_within(self.repetition_penalty, 1 / _LARGEST, _LARGEST),
                f"a number > 0 and at most {_LARGEST:g}; 1 is none",
            ),
            ("presence_penalty", _is_within(self.presence_penalty, -_LARGEST, _LARGEST), f"{_RANGE}; 0 is none"),
            ("frequency_penalty", _is_within(self.frequency_penalty, -_LARGEST, _LARGEST), f"{_RANGE}; 0 is none"),
            (
                "logit_bias",
                self.logit_bias is None or _is_bias(self.logit_bias),
                f"a dict by token id, each {_RANGE}; or None",
            ),
            ("bad_words", _is_bad_words(self.bad_words), "a list of texts, or of lists of token ids, none of them empty"),
            ("stop", _is_stop(self.stop), "a text that is not empty, or a list of such texts"),
            ("stop_token_ids", _is_ids(self.stop_token_ids), "a list of token ids"),
            ("min_tokens", is_integer(self.min_tokens, 0), "an integer >= 0"),
            ("ignore_eos", isinstance(self.ignore_eos, bool), "True or False"),
            ("priority", is_integer(self.priority), "an integer; lower ones start first"),
            (
                "timeout_s",
                self.timeout_s is None or (is_number(self.timeout_s) and self.timeout_s > 0),
                "seconds > 0, or None",
            ),
            ("parse_special_tokens", isinstance(self.parse_special_tokens, bool), "True or False"),
            ("skip_special_tokens", isinstance(self.skip_special_tokens, bool), "True or False"),
            ("top_logprobs", self.top_logprobs is None or is_integer(self.top_logprobs, 0), "an integer >= 0, or None"),
            (
                "json_schema",
                self.json_schema is None or isinstance(self.json_schema, Mapping) or _is_text(self.json_schema),
                "a JSON schema as a dictionary or as text, or None",
            ),
            ("regex", self.regex is None or _is_text(self.regex), "a text that is not empty, or None"),
            ("grammar", self.grammar is None or _is_text(self.grammar), "a text that is not empty, or None"),
            ("cache_salt", self.cache_salt == "" or _is_text(self.cache_salt), "a text"),
        ):
            if not valid:
                raise UsageError(f"bad {name}", got=repr(getattr(self, name)), expected=expected, parameter=name)
        if len(self.structures) > 1:
            raise UsageError(
                "the output can have one structure only",
                got=", ".join(self.structures),
                expected="one of json_schema, regex, grammar",
                parameter=next(iter(self.structures)),
            )
        if self.min_tokens > self.max_new_tokens:
            raise UsageError(
                "min_tokens exceeds max_new_tokens",
                got=self.min_tokens,
                expected=f"at most {self.max_new_tokens}",
                parameter="min_tokens",
            )
        if self.n > 1 and self.temperature == 0.0:
            raise UsageError(
                "several samples of a greedy choice would all be equal",
                got=f"n={self.n}, temperature 0",
                expected="n=1, or a temperature above 0",
                parameter="n",
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """``UsageError`` if a token id is not one of the model's."""
        given = {
            "logit_bias": list(self.logit_bias or ()),
            "stop_token_ids": list(self.stop_token_ids),
            "bad_words": [token_id for word in self.bad_words if not isinstance(word, str) for token_id in word],
        }
        for name, ids in given.items():
            if outside := [token_id for token_id in ids if token_id >= vocab_size]:
                raise UsageError(
                    f"{name} has token ids outside the vocabulary",
                    got=outside[:8],
                    expected=f"0 .. {vocab_size - 1}",
                    parameter=name,
                )

    @property
    def structures(self) -> dict[str, Mapping[str, Any] | str]:
        """What is given of ``json_schema``, ``regex`` and ``grammar``."""
        given = {"json_schema": self.json_schema, "regex": self.regex, "grammar": self.grammar}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def stop_texts(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class SamplingOptions(TypedDict, total=False):
    """The fields of ``SamplingParams`` as keyword arguments."""

    max_new_tokens: int
    n: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    typical_p: float
    seed: int | None
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    bad_words: Sequence[str | Sequence[int]]
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    min_tokens: int
    ignore_eos: bool
    priority: int
    timeout_s: float | None
    parse_special_tokens: bool
    skip_special_tokens: bool
    top_logprobs: int | None
    json_schema: Mapping[str, Any] | str | None
    regex: str | None
    grammar: str | None
    cache_salt: str


def _is_stop(stop: object) -> bool:
    texts = [stop] if isinstance(stop, str) else stop
    return isinstance(texts, list | tuple) and all(map(_is_text, texts))


def _is_within(value: object, low: float, high: float) -> bool:
    """Whether ``value`` is a finite number from ``low`` to ``high``."""
    return is_number(value) and math.isfinite(float(value)) and low <= float(value) <= high  # type: ignore[arg-type]


def _is_ids(ids: object) -> bool:
    return isinstance(ids, list | tuple) and all(is_integer(token_id, 0) for token_id in ids)


def _is_bias(bias: object) -> bool:
    return isinstance(bias, Mapping) and all(
        is_integer(token_id, 0) and _is_within(value, -_LARGEST, _LARGEST) for token_id, value in bias.items()
    )


def _is_bad_words(words: object) -> bool:
    return isinstance(words, list | tuple) and all(_is_text(word) or (word and _is_ids(word)) for word in words)


def _is_text(text: object) -> bool:
    """Whether it is a text that is not empty and has no half of a surrogate pair."""
    return isinstance(text, str) and bool(text) and lone_surrogate(text) is None
