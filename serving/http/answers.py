"""The answers of chats and completions: whole, and in chunks."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tokenizers import Tokenizer

from trt_kv import __version__
from trt_kv.runtime.generation import Generation, TokenLogprob
from trt_kv.serving.http.logprobs import chat_logprobs, completion_logprobs

_FINISH = {"stop": "stop", "length": "length", "timeout": "length", "cancelled": "stop"}


@dataclass(frozen=True, kw_only=True)
class News:
    """What is new of one sample: text, log-probabilities of tokens, and ``finish_reason`` if it has ended."""

    index: int
    text: str
    logprobs: Sequence[TokenLogprob] = ()
    finish_reason: str | None = None


class Form(Protocol):
    """How an endpoint writes its answers."""

    def whole(self, results: Sequence[Generation], usage: dict[str, Any]) -> dict[str, Any]:
        """The answer with all samples of all prompts."""
        ...

    def first(self, index: int) -> dict[str, Any] | None:
        """The chunk that begins a sample, if there is one."""
        ...

    def chunk(self, news: News) -> dict[str, Any]:
        """A chunk with what is new of a sample."""
        ...

    def last(self) -> dict[str, Any]:
        """The chunk that tells the usage."""
        ...


@dataclass(kw_only=True)
class ChatForm:
    """POST /v1/chat/completions."""

    model: str
    tokenizer: Tokenizer
    with_logprobs: bool
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, results: Sequence[Generation], usage: dict[str, Any]) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": sample.text, "refusal": None},
                "logprobs": chat_logprobs(self.tokenizer, sample.logprobs) if self.with_logprobs else None,
                "finish_reason": _FINISH.get(sample.finish_reason),
            }
            for index, sample in enumerate(sample for result in results for sample in result.samples)
        ]
        return _head(self, "chat.completion") | {"choices": choices, "usage": usage}

    def first(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": "", "refusal": None}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return _head(self, "chat.completion.chunk") | {"choices": [choice]}

    def chunk(self, news: News) -> dict[str, Any]:
        choice = {
            "index": news.index,
            "delta": {"content": news.text} if news.text or news.logprobs else {},
            "logprobs": chat_logprobs(self.tokenizer, news.logprobs) if news.logprobs else None,
            "finish_reason": news.finish_reason and _FINISH.get(news.finish_reason),
        }
        return _head(self, "chat.completion.chunk") | {"choices": [choice]}

    def last(self) -> dict[str, Any]:
        return _head(self, "chat.completion.chunk") | {"choices": []}


@dataclass(kw_only=True)
class CompletionForm:
    """POST /v1/completions. ``echoed``: the text in front of each prompt's samples, empty if it is not echoed."""

    model: str
    tokenizer: Tokenizer
    with_logprobs: bool
    echoed: Sequence[str]
    n: int
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))
    _lengths: dict[int, int] = field(default_factory=dict)

    def whole(self, results: Sequence[Generation], usage: dict[str, Any]) -> dict[str, Any]:
        samples = [sample for result in results for sample in result.samples]
        choices = [
            self._choice(index, self.echoed[index // self.n] + one.text, one.logprobs, one.finish_reason)
            for index, one in enumerate(samples)
        ]
        return _head(self, "text_completion") | {"choices": choices, "usage": usage}

    def first(self, index: int) -> dict[str, Any] | None:
        text = self.echoed[index // self.n]
        return _head(self, "text_completion") | {"choices": [self._choice(index, text, (), None)]} if text else None

    def chunk(self, news: News) -> dict[str, Any]:
        choice = self._choice(news.index, news.text, news.logprobs, news.finish_reason)
        return _head(self, "text_completion") | {"choices": [choice]}

    def last(self) -> dict[str, Any]:
        return _head(self, "text_completion") | {"choices": []}

    def _choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None) -> dict[str, Any]:
        offset = self._lengths.get(index, 0)
        self._lengths[index] = offset + len(text)
        told = completion_logprobs(self.tokenizer, logprobs, offset=offset) if self.with_logprobs else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": reason and _FINISH.get(reason)}


def _head(form: ChatForm | CompletionForm, kind: str) -> dict[str, Any]:
    fingerprint = f"trt-kv-{__version__}"
    return {"id": form.id, "object": kind, "created": form.created, "model": form.model, "system_fingerprint": fingerprint}
