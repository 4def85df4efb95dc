"""Conversations with an engine: messages become a prompt by its chat template, and the answer ends where a turn ends."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack, cast

from tokenizers import Tokenizer

from trt_kv.chat.encoder import ChatEncoder, ChatOptions
from trt_kv.chat.messages import Message
from trt_kv.chat.templates import chat_templates, is_chat_file
from trt_kv.chat.turns import end_of_turn_ids
from trt_kv.errors import EngineError
from trt_kv.manifest import Manifest
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.sampling import SamplingOptions, SamplingParams
from trt_kv.runtime.sampling.model_defaults import ModelDefaults, params_of_each
from trt_kv.runtime.stream import Stream
from trt_kv.safe_path import safe_join


class TemplateOptions(TypedDict, total=False):
    """What a chat template is given besides messages: fields of ``ChatOptions``."""

    tools: Sequence[Mapping[str, Any]] | None
    documents: Sequence[Mapping[str, Any]] | None
    template: str | None
    template_variables: Mapping[str, Any] | None
    continue_final_message: bool
    trusted: bool


class ChatKeywords(SamplingOptions, TemplateOptions, total=False):
    """Options of a conversation: those of its template, and those of sampling."""


class EngineChat:
    """The methods of ``Engine`` for conversations.

    ``messages``: dictionaries with ``role`` and ``content``, a text or a list of ``{"type": "text", "text": ...}``. Options of
    the template: ``tools`` (JSON schemas), ``documents``, ``template`` (the name or the text of one; default: the engine's, or
    its "tool_use" if there are tools), ``template_variables`` (what else it reads, e.g. ``{"enable_thinking": False}``),
    ``continue_final_message`` (the last message is left open, and its continuation generated), ``trusted`` (control tokens
    written in messages count; by default they are text, so that nobody ends a turn by writing <|im_end|>). Others: those of
    ``SamplingParams``.

    Raises ``UsageError`` for messages that are malformed or that the template refuses, with what it says, and for an engine
    without a template.
    """

    folder: Path
    manifest: Manifest
    tokenizer: Tokenizer
    model_defaults: ModelDefaults
    generate: Callable[..., Generation]
    stream: Callable[..., Stream]

    def chat(
        self, messages: Sequence[Message], params: SamplingParams | None = None, **options: Unpack[ChatKeywords]
    ) -> Generation:
        """Generate the assistant's answer to a conversation; errors as for ``generate`` too.

        >>> engine.chat([{"role": "user", "content": "What is the capital of France?"}], max_new_tokens=32).text
        """
        prompt, params = self.chat_request(messages, params, **options)
        return self.generate(prompt, params)

    def stream_chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        on_prefill: Callable[[int], None] | None = None,
        **options: Unpack[ChatKeywords],
    ) -> Stream:
        """Stream the assistant's answer; ``on_prefill`` and errors as for ``stream`` too."""
        prompt, params = self.chat_request(messages, params, **options)
        return self.stream(prompt, params, on_prefill=on_prefill)

    def encode_chat(self, messages: Sequence[Message], **options: Unpack[TemplateOptions]) -> list[int]:
        """Token ids of a conversation and of the head of the answer, as ``chat`` prefills them."""
        return self.chat_encoder.token_ids(messages, _template_options(dict(options)))

    def chat_request(
        self, messages: Sequence[Message], params: SamplingParams | None, **options: Unpack[ChatKeywords]
    ) -> tuple[list[int], SamplingParams]:
        """The prompt and the parameters of a conversation's request, which also ends at the template's end of a turn."""
        given: dict[str, Any] = dict(options)
        of_template = {name: given.pop(name) for name in TemplateOptions.__annotations__ if name in given}
        (chosen,) = params_of_each(1, params, cast(SamplingOptions, given), self.model_defaults.params)
        prompt = self.chat_encoder.token_ids(messages, _template_options(of_template))
        if chosen.ignore_eos:
            return prompt, chosen
        ends = [token for token in self._ends_of_turn if token not in chosen.stop_token_ids]
        return prompt, dataclasses.replace(chosen, stop_token_ids=(*chosen.stop_token_ids, *ends))

    @functools.cached_property
    def chat_encoder(self) -> ChatEncoder:
        """Renders and encodes conversations with the engine's templates."""
        return chat_encoder_of_engine(self.folder, self.manifest, self.tokenizer)

    @functools.cached_property
    def _ends_of_turn(self) -> tuple[int, ...]:
        """Tokens at which a turn ends that the manifest does not list: engines of earlier versions."""
        added = {token.content: i for i, token in self.tokenizer.get_added_tokens_decoder().items()}
        ends = end_of_turn_ids(self.chat_encoder.templates, added)
        return tuple(token for token in ends if token not in self.manifest.config.eos_token_ids)


def chat_encoder_of_engine(folder: Path, manifest: Manifest, tokenizer: Tokenizer) -> ChatEncoder:
    """The encoder of an engine, with templates from files that the manifest lists; ``EngineError`` if they are malformed."""
    names = [name for name in manifest.files if is_chat_file(name)]
    files = {name: safe_join(folder, name, error=EngineError) for name in names}
    return ChatEncoder(tokenizer, chat_templates(files, owner=str(folder), error=EngineError))


def _template_options(options: Mapping[str, Any]) -> ChatOptions:
    names = {"template_variables": "variables", "continue_final_message": "continue_final"}
    return ChatOptions(**{names.get(name, name): value for name, value in options.items()})
