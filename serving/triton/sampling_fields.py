"""Sampling parameters as a JSON object, with the names that clients of vLLM use; its values may be written as texts."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trt_kv.errors import UsageError
from trt_kv.text_file import shortened


def sampling_from_json(text: str | None, where: str) -> dict[str, Any]:
    """Fields of ``SamplingParams`` from a JSON text; None: none. ``UsageError`` names ``where`` and the field that is wrong."""
    try:
        found = {} if text is None else json.loads(text)
    except (ValueError, RecursionError) as cause:
        raise UsageError(f"{where} is not JSON", got=shortened(str(cause)), expected="a JSON object") from cause
    if not isinstance(found, dict):
        raise UsageError(f"bad {where}", got=type(found).__name__, expected="a JSON object")
    return sampling_from(found, where)


def sampling_from(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The same from a parsed object. Ranges are checked by ``SamplingParams``."""
    if unknown := sorted(set(found) - set(FIELDS)):
        raise UsageError(f"{where} has unknown fields", got=shortened(", ".join(unknown)), expected=", ".join(FIELDS))
    values = {}
    for name, value in found.items():
        if value is None:
            continue
        field, parse, expected = FIELDS[name]
        try:
            values[field] = parse(value)
        except (TypeError, ValueError, OverflowError, AttributeError, KeyError) as cause:
            raise UsageError(f"bad {name} in {where}", got=shortened(repr(value)), expected=expected) from cause
    return values


def _integer(value: Any) -> int:
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise TypeError(value)
    return int(value)


def _top_k(value: Any) -> int:
    count = _integer(value)
    return 0 if count == -1 else count  # -1: vLLM's way to say all


def _number(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError(value)
    return float(value)


def _boolean(value: Any) -> bool:
    return value if isinstance(value, bool) else {"true": True, "false": False}[value.lower()]


def _bias(value: Any) -> dict[int, float]:
    return {int(token): _number(bias) for token, bias in value.items()}


def _as_it_is(value: Any) -> str | Sequence[Any]:
    if not isinstance(value, str | list):
        raise TypeError(value)
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(value)
    return value


def _structure(value: Any) -> str | Mapping[str, Any]:
    if not isinstance(value, str | dict):
        raise TypeError(value)
    return value


_Field = tuple[str, Callable[[Any], Any], str]


def _named(names: Sequence[str], parse: Callable[[Any], Any], expected: str) -> dict[str, _Field]:
    return {name: (name, parse, expected) for name in names}


FIELDS: Mapping[str, _Field] = {
    "max_tokens": ("max_new_tokens", _integer, "an integer"),
    "logprobs": ("top_logprobs", _integer, "an integer"),
    "top_k": ("top_k", _top_k, "an integer; -1 or 0 is no limit"),
    **_named(("max_new_tokens", "min_tokens", "n", "seed"), _integer, "an integer"),
    **_named(("temperature", "top_p", "min_p", "typical_p", "timeout_s"), _number, "a number"),
    **_named(("repetition_penalty", "presence_penalty", "frequency_penalty"), _number, "a number"),
    **_named(("ignore_eos", "skip_special_tokens", "parse_special_tokens"), _boolean, "true or false"),
    **_named(("stop", "stop_token_ids", "bad_words"), _as_it_is, "a text or a list"),
    **_named(("json_schema", "regex", "grammar"), _structure, "a text, or for json_schema an object"),
    "cache_salt": ("cache_salt", _text, "a text"),
    "logit_bias": ("logit_bias", _bias, "an object of numbers by token id"),
}
"""Of each name: the field of ``SamplingParams``, how its value is read, and what that must be."""
