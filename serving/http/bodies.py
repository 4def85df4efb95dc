"""The bodies of requests, as OpenAI's clients send them and with the parameters that vLLM adds."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MOST_LOGPROBS = 20
# What is looked at in every step of an answer is bounded, because other requests wait for it.
_Stop = Annotated[str, Field(max_length=256)]
_Stops = Annotated[list[_Stop], Field(max_length=64)]
_BadWords = Annotated[list[str], Field(max_length=256)]
_Salt = Annotated[str, Field(min_length=1, max_length=1024)]
_Ids = Annotated[list[int], Field(max_length=1024)]
_Json = dict[str, Any]


class Body(BaseModel):
    """A JSON object without unknown fields and without conversions: "0.5" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class StreamOptions(Body):
    """``include_usage``: a last chunk tells the usage; ``continuous_usage_stats``: every chunk tells the usage so far."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class JsonSchema(Body):
    """The schema of a ``response_format``."""

    name: str | None = None
    description: str | None = None
    schema_: _Json = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer must be: any text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's way to say what the output must be; at most one."""

    json_: _Json | str | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None


class WithoutEffect(Body):
    """Fields of OpenAI's API that clients send and that change nothing here."""

    user: str | None = None
    store: bool | None = None
    metadata: _Json | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class Generating(WithoutEffect):
    """What requests for chats and completions have in common. None: the engine's default."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: _Stop | _Stops | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    response_format: ResponseFormat | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: _Ids | None = None
    bad_words: _BadWords | None = None
    skip_special_tokens: bool | None = None
    timeout_s: float | None = None
    cache_salt: _Salt | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: _Json | str | None = None
    guided_regex: str | None = None
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_grammar: str | None = None


class Templated(Body):
    """What the chat template is given."""

    messages: list[_Json]
    tools: list[_Json] | None = None
    documents: list[_Json] | None = None
    chat_template_kwargs: _Json | None = None
    continue_final_message: bool = False
    add_generation_prompt: bool | None = None


class SessionBody(Body):
    """A conversation that the server remembers: ``messages`` are then only what is new. ``mode``: as in ``Engine.session``
    (None: the one that it has, "compressed" for a new one). ``turns``: how many it must have had; None: any number.
    """

    id: Annotated[str, Field(min_length=1, max_length=256)]
    mode: Literal["exact", "compressed"] | None = None
    turns: Annotated[int, Field(ge=0)] | None = None


class ChatBody(Templated, Generating):
    """POST /v1/chat/completions."""

    session: SessionBody | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None


class CompletionBody(Generating):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None
    echo: bool = False
    best_of: int | None = None
    suffix: None = None


class TokenizeBody(Body):
    """POST /v1/tokenize: a text, or a conversation as a chat would prefill it."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False
    messages: list[_Json] | None = None
    tools: list[_Json] | None = None
    chat_template_kwargs: _Json | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False


class DetokenizeBody(Body):
    """POST /v1/detokenize."""

    model: str | None = None
    tokens: list[int]
