"""From the body of a request to the parameters and prompts of the engine."""

import json
from typing import Any, cast

from trt_kv.errors import UsageError
from trt_kv.runtime.async_session import AsyncSession
from trt_kv.runtime.chat import ChatKeywords
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.sampling import SamplingOptions, SamplingParams
from trt_kv.runtime.sampling.model_defaults import params_of_each
from trt_kv.runtime.turn import Turn
from trt_kv.serving.http.bodies import ChatBody, CompletionBody, Generating, Templated, TokenizeBody
from trt_kv.serving.http.refusals import RefusedError
from trt_kv.serving.http.settings import MAX_COMPLETION_TOKENS

_SAME = (
    *("n", "temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty", "min_p", "typical_p"),
    *("repetition_penalty", "min_tokens", "ignore_eos", "stop_token_ids", "bad_words", "skip_special_tokens", "timeout_s"),
    "cache_salt",
)
"""Fields with the names and the meaning of ``SamplingParams``."""


def chat_request(engine: Engine, body: ChatBody, *, max_new_tokens: int) -> tuple[list[int], SamplingParams]:
    """The prompt and the parameters of a chat; ``UsageError`` for what the template or the engine refuses."""
    given = chat_sampling(body, max_new_tokens=max_new_tokens)
    (params,) = params_of_each(1, None, cast(SamplingOptions, given), engine.default_sampling)
    return engine.chat_request(body.messages, params, **template_options(body))


async def chat_turn(session: AsyncSession, body: ChatBody, *, max_new_tokens: int) -> Turn:
    """What the new messages of a conversation ask for; errors as for ``chat_request``."""
    options = chat_sampling(body, max_new_tokens=max_new_tokens) | template_options(body)
    return await session.turn_of_messages(body.messages, **cast(ChatKeywords, options))


def chat_sampling(body: ChatBody, *, max_new_tokens: int) -> dict[str, Any]:
    """Fields of ``SamplingParams`` that a chat gives, and its limit."""
    given = _sampling(body)
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    given["max_new_tokens"] = max_new_tokens if limit is None else limit
    if body.logprobs:
        given["top_logprobs"] = body.top_logprobs or 0
    elif body.top_logprobs:
        raise RefusedError(400, "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
    return given


def completion_params(engine: Engine, body: CompletionBody) -> SamplingParams:
    """The parameters of each prompt of a completion."""
    given = _sampling(body)
    given["max_new_tokens"] = MAX_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    if body.logprobs is not None:
        given["top_logprobs"] = body.logprobs
    if body.echo and body.logprobs is not None:
        raise RefusedError(400, "echo with logprobs is not supported", param="echo", code="unsupported_value")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RefusedError(400, "best_of is supported only if it equals n", param="best_of", code="unsupported_value")
    (params,) = params_of_each(1, None, cast(SamplingOptions, given), engine.default_sampling)
    return params


def prompts_of(body: CompletionBody) -> list[str | list[int]]:
    """The prompts of a completion: one text or list of token ids, or several."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RefusedError(400, "prompt is empty", param="prompt", code="invalid_value")
    if all(isinstance(token, int) for token in prompt):
        return [[token for token in prompt if isinstance(token, int)]]
    return [one for one in prompt if not isinstance(one, int)]


def template_options(body: Templated | TokenizeBody) -> dict[str, Any]:
    """Options of ``Engine.chat`` for the template. It is the engine's own: a client cannot bring one."""
    if body.add_generation_prompt is False and not body.continue_final_message:
        raise RefusedError(400, "a chat needs the head of its answer", param="add_generation_prompt", code="unsupported_value")
    options = {"tools": body.tools or None, "template_variables": body.chat_template_kwargs}
    documents = body.documents if isinstance(body, Templated) else None
    return options | {"documents": documents or None, "continue_final_message": body.continue_final_message}


def _sampling(body: Generating) -> dict[str, Any]:
    """Fields of ``SamplingParams`` that are given."""
    given = {name: value for name in _SAME if (value := getattr(body, name)) is not None}
    if body.top_k is not None:
        given["top_k"] = 0 if body.top_k == -1 else body.top_k  # vLLM's way to say all
    if body.logit_bias is not None:
        given["logit_bias"] = {_token_id(key): value for key, value in body.logit_bias.items()}
    return given | _structure(body)


def _token_id(key: str) -> int:
    if not key.isdecimal() or len(key) > 10:
        raise UsageError("bad logit_bias", got=repr(key[:40]), expected="token ids as keys", parameter="logit_bias")
    return int(key)


def _structure(body: Generating) -> dict[str, Any]:
    """``json_schema``, ``regex`` or ``grammar`` of the output; ``RefusedError`` if several are given."""
    wanted = [(name, field, value) for name, field, value in _structures(body) if value is not None]
    if len(wanted) > 1:
        places = ", ".join(place for place, _, _ in wanted)
        raise RefusedError(
            400, f"the output can have one structure only, not {places}", param=wanted[1][0], code="invalid_value"
        )
    return {field: value for _, field, value in wanted}


def _structures(body: Generating) -> list[tuple[str, str, Any]]:
    """(field of the request, field of ``SamplingParams``, value) of everything that may give the output a structure."""
    of_format = body.response_format
    schema: Any = None
    if of_format is not None and of_format.type == "json_object":
        schema = {"type": "object"}
    if of_format is not None and of_format.type == "json_schema":
        if of_format.json_schema is None:
            raise RefusedError(
                400, "the schema is missing", param="response_format.json_schema", code="missing_required_parameter"
            )
        schema = of_format.json_schema.schema_
    found = [
        ("response_format", "json_schema", schema),
        ("guided_json", "json_schema", body.guided_json),
        ("guided_regex", "regex", body.guided_regex),
        ("guided_choice", "grammar", _grammar_of_choice(body.guided_choice)),
        ("guided_grammar", "grammar", body.guided_grammar),
    ]
    if (outputs := body.structured_outputs) is not None:
        found += [
            ("structured_outputs.json", "json_schema", outputs.json_),
            ("structured_outputs.json_object", "json_schema", {"type": "object"} if outputs.json_object else None),
            ("structured_outputs.regex", "regex", outputs.regex),
            ("structured_outputs.choice", "grammar", _grammar_of_choice(outputs.choice)),
            ("structured_outputs.grammar", "grammar", outputs.grammar),
        ]
    return found


def _grammar_of_choice(texts: list[str] | None) -> str | None:
    """A grammar, in Lark's notation, of one of several texts."""
    return None if texts is None else f"start: {' | '.join(json.dumps(text, ensure_ascii=False) for text in texts)}"
