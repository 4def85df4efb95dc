"""A conversation with an engine: its history, which is sent again with each message, and what can be said about its cache."""

import dataclasses
import json
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_kv.errors import UsageError

if TYPE_CHECKING:
    from trt_kv.runtime.engine import Engine
    from trt_kv.runtime.generation import Generation


class Conversation:
    """A conversation with ``engine``. Each message and its answer are added to ``messages``, also an answer that was stopped.

    ``sampling``: the fields of ``SamplingParams``; ``of_template``: the options of ``Engine.chat`` for templates.

    Example::

        from trt_kv import Engine
        from trt_kv.pipeline import Conversation

        with Engine.load("engines/mine") as engine:
            conversation = Conversation(engine, system="Answer in one sentence.", sampling={"max_new_tokens": 64})
            for piece in conversation.answer("Why is the sky blue?"):
                print(piece, end="", flush=True)
    """

    def __init__(
        self,
        engine: "Engine",
        *,
        system: str | None = None,
        sampling: Mapping[str, Any] | None = None,
        of_template: Mapping[str, Any] | None = None,
    ) -> None:
        self.engine = engine
        self.messages: list[dict[str, str]] = []
        self.last: Generation | None = None
        """The result of the last answer."""
        self._options = {**(sampling or {}), **(of_template or {})}
        engine.chat_encoder.templates.chosen((of_template or {}).get("template"), has_tools=False)
        self.start(system)

    @property
    def system(self) -> str | None:
        """The system message; None: none of one's own, so that the template's default is used, if it has one."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    def start(self, system: str | None) -> None:
        """Forget what was said, and begin with a system message, or with none."""
        self.messages, self.last = [], None
        if system is not None:
            self.messages.append({"role": "system", "content": system})

    def answer(self, text: str, *, on_prefill: Callable[[int], None] | None = None) -> Generator[str, None, None]:
        """Stream the answer to a message; closing the iterator stops it and keeps what was said so far.

        Raises ``UsageError`` for what the template refuses and for a conversation that the model's context has no room for; the
        message is then not part of the conversation.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, params = self.engine.chat_request(messages, None, **self._options)
        self._check_room(len(prompt))
        stream = self.engine.stream(prompt, params, on_prefill=on_prefill)
        is_whole = is_stopped = False
        try:
            yield from stream
            is_whole = True
        except (GeneratorExit, KeyboardInterrupt):
            is_stopped = True
            raise
        finally:
            stream.close()
            self.last = stream.result
            if is_stopped:  # to the engine, an interrupt in the middle of a step is an error
                self.last = dataclasses.replace(self.last, finish_reason="cancelled", error=None)
            if self.last.text or is_whole:
                self.messages = [*messages, {"role": "assistant", "content": self.last.text}]

    def save(self, path: str | Path) -> None:
        """Write the conversation to the new file ``path``, as one JSON line, which calibration reads as a prompt."""
        try:
            with Path(path).open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as cause:
            raise UsageError(
                "the conversation cannot be saved", got=f"{path}: {cause.strerror}", expected="a new file"
            ) from cause

    def _check_room(self, n_tokens: int) -> None:
        most = self.engine.manifest.config.max_positions
        if n_tokens >= most:
            raise UsageError(
                "the conversation does not fit into the model's context any more",
                got=f"{n_tokens} tokens with this message",
                expected=f"fewer than {most}, as an answer needs some",
                fix="start again (/reset), or send a shorter message; /save FILE keeps the conversation",
            )
