"""A conversation with an engine: its history, and what can be said about its cache."""

import json
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_kv.errors import UsageError

if TYPE_CHECKING:
    from trt_kv.runtime.engine import Engine
    from trt_kv.runtime.generation import Generation
    from trt_kv.runtime.session import Mode


class Conversation:
    """A conversation with ``engine``. Each message and its answer are added to ``messages``, also an answer that was stopped.

    ``sampling``: the fields of ``SamplingParams``; ``of_template``: the options of ``Engine.chat`` for templates; ``mode``: see
    ``Engine.session``. ``file``: the conversation is written there after each answer, and continued if the file exists, in its
    own mode and with its own system message.

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
        mode: "Mode" = "exact",
        file: Path | None = None,
    ) -> None:
        self.engine = engine
        engine.chat_encoder.templates.chosen((of_template or {}).get("template"), has_tools=False)
        self.session = engine.session(mode=mode, system=system, **(sampling or {}), **(of_template or {}))
        self._file = file
        if file is not None and file.exists():
            self.session.load(file)

    @property
    def messages(self) -> list[Mapping[str, Any]]:
        return list(self.session.messages)

    @property
    def last(self) -> "Generation | None":
        """The result of the last answer."""
        return self.session.last

    @property
    def system(self) -> str | None:
        """The system message; None: none of one's own, so that the template's default is used, if it has one."""
        return self.session.system

    def start(self, system: str | None) -> None:
        """Forget what was said, and begin with a system message, or with none."""
        self.session.reset(system)

    def answer(self, text: str, *, on_prefill: Callable[[int], None] | None = None) -> Generator[str, None, None]:
        """Stream the answer to a message; closing the iterator stops it and keeps what was said so far.

        Raises ``UsageError`` for what the template refuses and for a conversation that the model's context has no room for; the
        message is then not part of the conversation.
        """
        try:
            yield from self.session.stream_chat(text, on_prefill=on_prefill)
        finally:
            if self._file is not None:
                self.session.save(self._file)

    def save(self, path: str | Path) -> None:
        """Write the messages to the new file ``path``, as one JSON line, which calibration reads as a prompt."""
        try:
            with Path(path).open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as cause:
            raise UsageError(
                "the conversation cannot be saved", got=f"{path}: {cause.strerror}", expected="a new file"
            ) from cause

    def fork(self, path: Path) -> None:
        """Write the conversation, with what was kept, to the new file ``path``."""
        if path.exists():
            raise UsageError("the conversation cannot be saved", got=f"{path}: File exists", expected="a new file")
        self.session.save(path)
