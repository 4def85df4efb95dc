"""What a line means in ``trt-kv chat``: a message, or a command."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from trt_kv.cache_layers import layer_name
from trt_kv.cli.generation_notes import held_note
from trt_kv.manifest import Manifest
from trt_kv.pipeline.chat import Conversation

if TYPE_CHECKING:
    from trt_kv.runtime.generation import Generation

HELP = """/help lists the commands
  /reset         begin again, with the same system message
  /system TEXT   begin again with this system message; without TEXT, with none
  /policy        what each layer holds of the conversation
  /save FILE     write the messages to a new file, as calibration and evaluation read them
  /fork FILE     write the conversation to a new file, to go on from here with --session FILE or /load FILE
  /load FILE     go on with the conversation in FILE
  /exit          leave
A message that begins with / is written with //."""


class StopChat(Exception):  # noqa: N818  (no error: the user leaves)
    """The user leaves."""


class Session:
    """Takes the lines of a user. ``write`` is given pieces of answers; ``say`` lines about them."""

    def __init__(self, conversation: Conversation, *, write: Callable[[str], None], say: Callable[[str], None]) -> None:
        self.conversation = conversation
        self._write = write
        self._say = say

    def take(self, line: str, *, check: Callable[[], None] = lambda: None) -> None:
        """Answer a message, or run a command. ``StopChat`` if it is /exit; errors as for ``Conversation.answer``.

        ``check`` is called after each chunk of the prompt and each piece of the answer; what it raises stops the answer.
        """
        if line.startswith("/") and not line.startswith("//"):
            name, _, rest = line[1:].partition(" ")
            self._run(name, rest.strip())
        elif line.strip():
            self._answer(line[1:] if line.startswith("//") else line, check)

    def _answer(self, text: str, check: Callable[[], None]) -> None:
        with contextlib.closing(self.conversation.answer(text, on_prefill=lambda _: check())) as answer:
            begun = False
            try:
                for piece in answer:
                    begun = True
                    self._write(piece)
                    check()
                begun = True  # an empty answer has a line too
            finally:
                if begun:
                    self._write("\n")
        self._say_why_it_ended()

    def _say_why_it_ended(self) -> None:
        result, config = self.conversation.last, self.conversation.engine.manifest.config
        if result is None or result.finish_reason != "length":
            return
        if result.n_prompt_tokens + len(result.token_ids) > config.max_positions:
            self._say(
                f"[the model's context of {config.max_positions} tokens is full, which cut the answer: /reset begins again, "
                "/save FILE keeps the conversation]"
            )
        else:
            self._say(f"[cut after {len(result.token_ids)} tokens; --max-new-tokens allows for more]")

    def _run(self, name: str, rest: str) -> None:
        conversation = self.conversation
        if name in ("exit", "quit"):
            raise StopChat
        if name == "reset":
            conversation.start(conversation.system)
        elif name == "system":
            conversation.start(rest or None)
        elif name == "policy":
            self._say("\n".join(policy_lines(conversation.engine.manifest, conversation.last)))
        elif name in ("save", "fork", "load") and not rest:
            self._say(f"[/{name} needs the name of a file: /{name} FILE]")
        elif name == "save":
            conversation.save(Path(rest))
            self._say(f"[saved: {rest}]")
        elif name == "fork":
            conversation.fork(Path(rest))
            self._say(f"[saved: {rest}; this conversation goes on without it]")
        elif name == "load":
            conversation.session.load(rest)
            self._say(f"[{len(conversation.messages)} messages, mode {conversation.session.mode}]")
        elif name == "help":
            self._say(HELP)
        else:
            self._say(f"[/{name} is no command; /help lists them, and a message that begins with / is written with //]")


def policy_lines(manifest: Manifest, last: "Generation | None") -> Iterator[str]:
    """The policy, and the tokens that each layer of the cache held at the end of the last answer."""
    policy = manifest.policy
    yield f"policy {policy.name}: {policy.summary}"
    if last is None or not last.num_computed_tokens:
        shares = ", ".join(f"{share:.0%}" for share in manifest.kept_shares)
        yield f"nothing is held yet; the {'layers' if manifest.heads_apart == 1 else 'KV heads'} may keep {shares}"
        return
    seen, first = last.num_computed_tokens, 0
    for held, layers in itertools.groupby(last.kv_tokens):
        n_layers = len(list(layers))
        names = [layer_name(layer, manifest.heads_apart) for layer in (first, first + n_layers - 1)]
        name = f"layer {names[0]}" if n_layers == 1 else f"layers {'-'.join(names)}"
        yield f"{name:>13}: {held:6} of {seen} tokens, {held / seen:4.0%}"
        first += n_layers
    yield held_note(manifest, last)
