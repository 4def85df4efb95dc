"""The sampling parameters that a model's ``generation_config.json`` recommends, for requests that give none."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trt_kv.errors import EngineError, UsageError
from trt_kv.json_file import MAX_DOCUMENT_BYTES, read_json
from trt_kv.manifest import Manifest
from trt_kv.runtime.sampling.params import SamplingOptions, SamplingParams
from trt_kv.safe_path import safe_join

GENERATION_CONFIG = "generation_config.json"

_FILTERS = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_TRANSFORMERS_TEMPERATURE = 1.0
"""What transformers samples with if the file asks for sampling without a temperature."""
_UNSUPPORTED: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "top_h": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "exponential_decay_length_penalty": None,
    "sequence_bias": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1.0,
    "watermarking_config": None,
}
"""Settings by which transformers would generate other texts, and the values at which they do nothing."""


@dataclass(frozen=True, kw_only=True)
class ModelDefaults:
    """``params``: parameters of a request that gives none. ``given``: the fields among them that the file sets, and that have
    an effect, now or once a request sets a temperature. ``ignored``: settings of the file that trt-kv does not have.
    """

    params: SamplingParams
    given: Mapping[str, Any]
    ignored: Mapping[str, Any]

    def in_force(self, params: SamplingParams, replaced: Sequence[str] = ()) -> dict[str, Any]:
        """The fields of a request's ``params`` that have their value from the file and an effect on the request.

        ``replaced``: fields that the request gave itself.
        """
        greedy = params.temperature == 0.0
        return {name: value for name, value in self.given.items() if name not in replaced and not (greedy and name in _FILTERS)}


NO_DEFAULTS = ModelDefaults(params=SamplingParams(), given={}, ignored={})
"""Of a model that recommends nothing."""


def model_defaults_of(folder: Path, manifest: Manifest) -> ModelDefaults:
    """What the model of an engine recommends. ``EngineError`` for a file that cannot be used."""
    if GENERATION_CONFIG not in manifest.files:
        return NO_DEFAULTS
    path = safe_join(folder, GENERATION_CONFIG, error=EngineError)
    data = read_json(path, kind="generation config", error=EngineError, max_bytes=MAX_DOCUMENT_BYTES)
    defaults = model_defaults_from(data, source=str(path))
    try:
        defaults.params.check_vocabulary(manifest.config.vocab_size)
    except UsageError as error:
        raise _refusal(str(path), error) from error
    return defaults


def model_defaults_from(data: Any, *, source: str) -> ModelDefaults:
    """The parameters in a parsed ``generation_config.json``, which ``source`` names.

    As in transformers, the model samples only if ``do_sample`` is true; else the filters in the file act if a request sets a
    temperature. Lengths (``max_new_tokens``, ``max_length``) are limits of a program, not of a model, and are left to the
    request. Raises ``EngineError`` for a value that a request could not have.
    """
    if not isinstance(data, Mapping):
        raise EngineError(f"{source} has no JSON object", got=type(data).__name__, expected="an object")
    found = {name: value for name, value in data.items() if value is not None}
    samples = found.get("do_sample", False)
    if not isinstance(samples, bool):
        raise EngineError(f"bad do_sample in {source}", got=repr(samples), expected="true or false")
    try:
        given = _fields_of(found, samples=samples)
        params = SamplingParams(**given)
    except UsageError as error:
        raise _refusal(source, error) from error
    neutral = SamplingParams()
    names = [field.name for field in dataclasses.fields(params) if field.name in given]
    effective = {name: given[name] for name in names if given[name] != getattr(neutral, name)}
    ignored = {name: found[name] for name, none in _UNSUPPORTED.items() if name in found and found[name] not in (none, False)}
    return ModelDefaults(params=params, given=effective, ignored=ignored)


def _fields_of(found: Mapping[str, Any], *, samples: bool) -> dict[str, Any]:
    """Fields of ``SamplingParams`` from those of the file that are not null."""
    same = ("top_p", "min_p", "typical_p", "repetition_penalty")
    fields = {name: found[name] for name in same if name in found}
    if "top_k" in found:
        fields["top_k"] = 0 if found["top_k"] == -1 else found["top_k"]  # -1: vLLM's way to say all
    if samples:
        fields["temperature"] = found.get("temperature", _TRANSFORMERS_TEMPERATURE)
    if "stop_strings" in found:
        fields["stop"] = found["stop_strings"]
    words = [*_listed(found, "bad_words_ids"), *([token_id] for token_id in _listed(found, "suppress_tokens"))]
    return fields | ({"bad_words": words} if words else {})


def _listed(found: Mapping[str, Any], name: str) -> list[Any]:
    value = found.get(name, [])
    if not isinstance(value, list):
        raise UsageError(f"bad {name}", got=repr(value), expected="a list")
    return value


def _refusal(source: str, error: UsageError) -> EngineError:
    return EngineError(
        f"{source} recommends sampling parameters that no request can have: {error.what}",
        got=error.got,
        expected=error.expected,
        fix="correct the checkpoint's generation_config.json and build again, or load with model_defaults=False "
        "(--no-model-defaults)",
    )


def params_of_each(
    n: int,
    params: SamplingParams | Sequence[SamplingParams] | None,
    sampling: SamplingOptions,
    defaults: SamplingParams,
) -> list[SamplingParams]:
    """The parameters of each of ``n`` requests: ``params``, or ``defaults`` with single ones replaced by ``sampling``.

    ``UsageError`` if they are given twice, or not for each request.
    """
    if params is not None and sampling:
        raise UsageError(
            "sampling options are given twice", got=f"params and {', '.join(sampling)}", expected="params, or options by name"
        )
    if params is None or isinstance(params, SamplingParams):
        return [_replaced(defaults, sampling) if params is None else params] * n
    if not isinstance(params, Sequence) or not all(isinstance(of_prompt, SamplingParams) for of_prompt in params):
        raise UsageError(
            "params are not SamplingParams", got=type(params).__name__, expected="SamplingParams, or a list with one per prompt"
        )
    if len(params) != n:
        raise UsageError("the number of params is not the number of prompts", got=len(params), expected=n)
    return list(params)


def _replaced(defaults: SamplingParams, sampling: SamplingOptions) -> SamplingParams:
    replace: Callable[..., SamplingParams] = dataclasses.replace
    return replace(defaults, **sampling)
