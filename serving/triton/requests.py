"""What a client of Triton asks for, read from the tensors and parameters of its request."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np

from trt_kv.errors import UsageError
from trt_kv.runtime.sampling import SamplingOptions
from trt_kv.serving.triton.sampling_fields import FIELDS, sampling_from, sampling_from_json

Arrays = Mapping[str, np.ndarray]
"""Tensors of a request by name; texts are arrays of bytes."""

_TENSORS = {
    "max_tokens": "max_new_tokens",
    **{name: name for name in ("min_tokens", "temperature", "top_k", "top_p", "seed")},
    **{name: name for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")},
}
"""Fields of ``SamplingParams`` by the tensor that holds their one number."""

RETURNED = {
    "return_finish_reason": ("finish_reason",),
    "return_num_input_tokens": ("num_input_tokens",),
    "return_num_output_tokens": ("num_output_tokens",),
    "return_cumulative_logprob": ("cumulative_logprob",),
    "return_logprobs": ("logprobs",),
    "return_log_probs": ("cumulative_logprob", "logprobs"),
    "return_output_ids": ("output_ids",),
}
"""The outputs that each input of this kind asks for."""


@dataclass(frozen=True, kw_only=True)
class TritonRequest:
    """A prompt, its sampling parameters by name, whether parts of the answer are sent as they are made, whether the prompt is
    put in front of the text, and which outputs are returned besides the text.
    """

    prompt: str | list[int]
    sampling: SamplingOptions
    streams: bool = False
    repeats_prompt: bool = False
    returned: frozenset[str] = field(default_factory=frozenset)


def read_request(arrays: Arrays, parameters: Mapping[str, Any], *, timeout_us: int = 0) -> TritonRequest:
    """The request in both formats: as tensors, and as a JSON object in ``sampling_parameters``; tensors take precedence.

    ``parameters``: of Triton's request; those with names of sampling parameters are read like that object, others are not ours.
    ``timeout_us``: Triton's, 0 for none. ``UsageError`` names the field that is wrong.
    """
    given = _text(arrays, "sampling_parameters")
    known = {name: value for name, value in parameters.items() if name in FIELDS}
    sampling = sampling_from(known, "the request's parameters") | sampling_from_json(given, "sampling_parameters")
    sampling |= {field: _value(arrays, name) for name, field in _TENSORS.items() if name in arrays}
    for name, field_name in (("stop_words", "stop"), ("bad_words", "bad_words")):
        if name in arrays:
            sampling[field_name] = [text for text in _texts(arrays, name) if text]
    _read_ends(arrays, sampling)
    _refuse_beams(arrays)
    if timeout_us > 0:
        sampling["timeout_s"] = timeout_us / 1e6
    streams = _flag(arrays, "stream", default=False)
    returned = frozenset(
        output for name, outputs in RETURNED.items() if _flag(arrays, name, default=False) for output in outputs
    )
    if "input_ids" in arrays:
        returned |= {"output_ids"}
    if returned & {"logprobs", "cumulative_logprob"}:
        sampling.setdefault("top_logprobs", 0)
    _check_samples(sampling, streams, returned)
    # vLLM's backend repeats the prompt unless it is told not to, or streams.
    excludes = _flag(arrays, "exclude_input_in_output", default=streams or given is None or "input_ids" in arrays)
    if "input_ids" in arrays and not excludes:
        raise UsageError("only a text is repeated", got="input_ids, exclude_input_in_output=false", fix="send text_input")
    return TritonRequest(
        prompt=_prompt(arrays),
        sampling=cast(SamplingOptions, sampling),
        streams=streams,
        repeats_prompt=not excludes,
        returned=returned,
    )


def in_clients_words(error: UsageError) -> UsageError:
    """An error about ``SamplingParams`` with the names that clients of Triton know."""
    names = {"max_new_tokens": "max_tokens", "top_logprobs": "logprobs"}
    what = re.sub("|".join(names), lambda match: names[match[0]], error.what)
    return UsageError(what, got=error.got, expected=error.expected, fix=error.fix, parameter=error.parameter)


def _prompt(arrays: Arrays) -> str | list[int]:
    if ("text_input" in arrays) == ("input_ids" in arrays):
        raise UsageError(
            "a request has one prompt",
            got="text_input and input_ids" if "text_input" in arrays else "neither text_input nor input_ids",
            expected="text_input, or input_ids",
            fix="send one of them",
        )
    text = _text(arrays, "text_input")
    return [int(token) for token in arrays["input_ids"].reshape(-1)] if text is None else text


def _text(arrays: Arrays, name: str) -> str | None:
    if name not in arrays:
        return None
    _check_one(arrays, name)
    return _texts(arrays, name)[0]


def _texts(arrays: Arrays, name: str) -> list[str]:
    try:
        return [text.decode() if isinstance(text, bytes) else str(text) for text in arrays[name].reshape(-1)]
    except UnicodeDecodeError as cause:
        raise UsageError(f"bad {name}", got=f"bytes that are not UTF-8, at {cause.start}", expected="text in UTF-8") from cause


def _check_one(arrays: Arrays, name: str) -> None:
    if arrays[name].size != 1:
        raise UsageError(f"bad {name}", got=f"shape {list(arrays[name].shape)}", expected="one value")


def _value(arrays: Arrays, name: str) -> int | float:
    """A number; of fp32 the decimal that is meant by it: 0.7, not 0.699999988."""
    _check_one(arrays, name)
    value = arrays[name].reshape(-1)[0]
    return float(str(value)) if arrays[name].dtype.kind == "f" else int(value)


def _flag(arrays: Arrays, name: str, *, default: bool) -> bool:
    if name not in arrays:
        return default
    _check_one(arrays, name)
    return bool(arrays[name].reshape(-1)[0])


def _read_ends(arrays: Arrays, sampling: dict[str, Any]) -> None:
    """``end_id`` ends the output as the model's own tokens do; -1: nothing but stop words and the length ends it."""
    if "end_id" in arrays:
        end = int(_value(arrays, "end_id"))
        if end < 0:
            sampling["ignore_eos"] = True
        else:
            sampling["stop_token_ids"] = [*sampling.get("stop_token_ids", ()), end]


def _refuse_beams(arrays: Arrays) -> None:
    for name in ("beam_width", "length_penalty"):
        if name in arrays and _value(arrays, name) != 1:
            raise UsageError(f"bad {name}: there is no beam search", got=_value(arrays, name), expected=1)


def _check_samples(sampling: Mapping[str, Any], streams: bool, returned: frozenset[str]) -> None:
    if sampling.get("n", 1) != 1 and (streams or "output_ids" in returned):
        raise UsageError(
            "several samples are returned as whole texts",
            got=f"n={sampling['n']} with stream or output_ids",
            expected="n=1",
            fix="send requests with different seeds",
        )
