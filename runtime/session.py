"""Conversations that an engine remembers: each turn goes on from the turns before it (docs/decisions/0066-conversations.md).

Mode "exact": a turn has the tokens that the whole history, sent anew, would have; the prefix cache makes that cheap. Mode
"compressed": a turn goes on from what the last one kept, so the cache stays within the policy's budget.
"""

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack, cast, get_args

from trt_kv.chat.messages import Message
from trt_kv.errors import UsageError
from trt_kv.runtime.cache.states import SequenceState
from trt_kv.runtime.chat import ChatKeywords, TemplateOptions
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.request import Request
from trt_kv.runtime.samples import check_one_sample
from trt_kv.runtime.sampling import SamplingOptions, SamplingParams
from trt_kv.runtime.sampling.model_defaults import params_of_each
from trt_kv.runtime.session_file import SavedSession, read_session, write_session
from trt_kv.runtime.stream import Stream
from trt_kv.runtime.text.prompts import Prompt
from trt_kv.runtime.turn import Turn

if TYPE_CHECKING:
    from trt_kv.runtime.engine import Engine

Mode = Literal["exact", "compressed"]
_STAND_IN = {"role": "assistant", "content": "x"}
"""In place of an answer, to see what a template writes behind one: it may leave parts of an answer out later."""


class Session:
    """A conversation with an engine, of messages (``chat``, ``stream_chat``) or of prompts that continue each other
    (``generate``, ``stream``). Made by ``Engine.session``.

    Between turns it holds no pages of the engine; in mode "compressed" it has a copy of what was kept. A turn that is refused
    leaves it as it was; an answer that is stopped stays as far as it got. One turn runs at a time: until its iterator has ended
    or is closed, other turns, ``reset`` and ``load`` are a ``UsageError``. ``fork`` and ``save`` have what was said before it.

    >>> session = engine.session(system="Answer in one sentence.", max_new_tokens=64)
    >>> session.chat("Why is the sky blue?").text
    >>> session.chat("And at night?").text
    """

    def __init__(
        self, engine: "Engine", *, mode: Mode = "exact", system: str | None = None, options: Mapping[str, Any] | None = None
    ) -> None:
        """``options``: those of ``Engine.chat``, which every turn has unless it has its own."""
        if mode not in get_args(Mode):
            raise UsageError("bad mode of a conversation", got=repr(mode), expected="exact or compressed", parameter="mode")
        if mode == "compressed":
            engine.runner.states.check()
        self.engine = engine
        self.last: Generation | None = None
        """The result of the last turn."""
        self._said = _nothing_said(mode, system)  # never changed, only replaced: others may be reading it
        self._options = dict(options or {})
        self._turn_lock = threading.Lock()

    @property
    def mode(self) -> Mode:
        return cast(Mode, self._said.mode)

    @property
    def messages(self) -> list[Message]:
        """All messages so far, of users and of the assistant, in a list of their own."""
        return list(self._said.messages)

    @property
    def token_ids(self) -> list[int]:
        """All tokens so far, as they were read and generated, in a list of their own."""
        return list(self._said.token_ids)

    @property
    def system(self) -> str | None:
        """The system message; None: none of one's own, so that the template's default is used, if it has one."""
        messages = self._said.messages
        return messages[0]["content"] if messages and messages[0]["role"] == "system" else None

    @property
    def n_turns(self) -> int:
        """Messages that have been answered."""
        return sum(message["role"] == "assistant" for message in self._said.messages)

    @property
    def n_bytes(self) -> int:
        """Memory of what is remembered, about."""
        said = self._said
        texts = sum(len(str(message.get("content"))) for message in said.messages)
        return 8 * len(said.token_ids) + texts + (0 if said.state is None else said.state.n_bytes)

    @property
    def held_tokens(self) -> tuple[int, ...]:
        """Per layer, how many of ``token_ids`` the next turn goes on from without reading them; empty in mode "exact"."""
        return () if self._said.state is None else self._said.state.kv_len

    @property
    def in_turn(self) -> bool:
        """Whether a turn runs."""
        return self._turn_lock.locked()

    def reset(self, system: str | None = None) -> None:
        """Forget what was said, and begin with a system message, or with none."""
        with self._alone():
            self._said, self.last = _nothing_said(self.mode, system), None

    def fork(self) -> "Session":
        """A conversation that begins with this one, and goes on independently."""
        fork = copy.copy(self)
        fork._turn_lock = threading.Lock()
        return fork

    def chat(self, message: str, **options: Unpack[ChatKeywords]) -> Generation:
        """The answer to a message of the user; errors as for ``Engine.chat``."""
        return self._whole(self.stream_chat(message, **options))

    def stream_chat(
        self, message: str, *, on_prefill: Callable[[int], None] | None = None, **options: Unpack[ChatKeywords]
    ) -> Generator[str, None, None]:
        """Stream the answer to a message of the user. Closing the iterator stops it."""
        with self._alone():
            yield from self._answered(self.turn_of_messages([{"role": "user", "content": message}], **options), on_prefill)

    def generate(self, prompt: Prompt, **sampling: Unpack[SamplingOptions]) -> Generation:
        """The continuation of all prompts and continuations so far, and of ``prompt``; errors as for ``Engine.generate``."""
        return self._whole(self.stream(prompt, **sampling))

    def stream(
        self, prompt: Prompt, *, on_prefill: Callable[[int], None] | None = None, **sampling: Unpack[SamplingOptions]
    ) -> Generator[str, None, None]:
        """Stream the continuation of a prompt. Closing the iterator stops it."""
        with self._alone():
            yield from self._answered(self.turn_of_prompt(prompt, **sampling), on_prefill)

    def begin_turn(self) -> None:
        """From now on no other turn may begin, until ``end_turn``; for servers. ``UsageError`` if one runs."""
        if not self._turn_lock.acquire(blocking=False):
            raise UsageError(
                "a turn of this conversation is running",
                got="another one",
                expected="one turn at a time",
                fix="wait for the end of its answer, or close its iterator; fork() begins a conversation of its own",
            )

    def end_turn(self) -> None:
        """Undo ``begin_turn``."""
        self._turn_lock.release()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        self.begin_turn()
        try:
            yield
        finally:
            self.end_turn()

    def turn_of_messages(self, messages: Sequence[Message], **options: Unpack[ChatKeywords]) -> Turn:
        """What the next messages ask of the engine; between ``begin_turn`` and ``end_turn``, with ``record`` at the end."""
        said = self._said
        self._check_kind(bool(said.token_ids) and len(said.messages) < 2, "prompts", "messages")
        given = cast(ChatKeywords, {**self._options, **options})
        whole = [*said.messages, *messages]
        ids, params = self.engine.chat_request(whole, None, **given)
        if self.mode == "compressed" and said.token_ids:
            ids = [*said.token_ids, *self._behind_answer(messages, given)]
        return self._turn(ids, params, whole)

    def turn_of_prompt(self, prompt: Prompt, **sampling: Unpack[SamplingOptions]) -> Turn:
        """The same for a prompt that goes on where the last continuation ended."""
        said = self._said
        self._check_kind(bool(said.messages), "messages", "prompts")
        given = {name: value for name, value in self._options.items() if name not in TemplateOptions.__annotations__} | sampling
        (params,) = params_of_each(1, None, cast(SamplingOptions, given), self.engine.default_sampling)
        is_part = isinstance(prompt, str) and bool(said.token_ids)
        encode: Callable[..., list[int]] = self.engine.encode_part if is_part else self.engine.encode
        new = encode(prompt, parse_special_tokens=params.parse_special_tokens)
        return self._turn([*said.token_ids, *new], params, ())

    def record(self, turn: Turn, result: Generation, state: SequenceState | None) -> None:
        """Add a turn and its answer. ``state``: of its request, None if that did not end by itself: then the next turn reads
        its tokens again.
        """
        said = self._said
        answered = [*turn.messages, {"role": "assistant", "content": result.text}] if turn.messages else said.messages
        self.last = result
        self._said = SavedSession(
            mode=said.mode,
            messages=answered,
            token_ids=[*turn.history, *result.token_ids],
            state=said.state if state is None else state,
        )

    def record_stopped(self, turn: Turn, result: Generation) -> None:
        """Add a turn whose answer did not end by itself, as far as it got; nothing if it has no text."""
        if result.text:
            self.record(turn, result, None)
        else:
            self.last = result

    def save(self, path: str | Path) -> None:
        """Write the conversation to a file, which ``Engine.load_session`` reads. A file that is there is replaced as a whole;
        nobody but the user can read it. ``UsageError`` if it cannot be written.
        """
        write_session(Path(path), self._said, self._fingerprint)

    def load(self, path: str | Path) -> None:
        """Become the conversation that ``save`` wrote. ``UsageError`` for a file that is none, is damaged, or is of another
        engine; nothing has changed then.
        """
        with self._alone():
            saved = read_session(Path(path), self._fingerprint, vocab_size=self.engine.manifest.config.vocab_size)
            if saved.mode == "compressed":
                self.engine.runner.states.check(saved.state)
            self._said, self.last = saved, None

    @property
    def _fingerprint(self) -> Mapping[str, Any]:
        """What a file must be of, to be read here."""
        return {"engine": self.engine.manifest.to_json()["digest"], "stored_as": self.engine.runner.pool.kv_dtype}

    def _turn(self, history: Sequence[int], params: SamplingParams, messages: Sequence[Message]) -> Turn:
        check_one_sample(params)
        self._check_room(len(history))
        state = self._said.state
        n_before = 0 if state is None else state.num_computed_tokens
        return Turn(
            history=history,
            prompt_ids=history[n_before:],
            params=params,
            messages=messages,
            begins_with=state,
            keeps_state=self.mode == "compressed",
        )

    def _behind_answer(self, messages: Sequence[Message], options: ChatKeywords) -> list[int]:
        """The tokens between the last answer and the next one: the end of the one, the new messages, the head of the other."""
        of_template = cast(TemplateOptions, {k: v for k, v in options.items() if k in TemplateOptions.__annotations__})
        before = [*self._said.messages[:-1], _STAND_IN]
        cut = cast(TemplateOptions, {**of_template, "continue_final_message": True})
        begin = self.engine.encode_chat(before, **cut)
        whole = self.engine.encode_chat([*before, *messages], **of_template)
        if whole[: len(begin)] != begin:
            raise UsageError(
                "the chat template writes what was said differently once more is said, so nothing can be added to it",
                got="another beginning of the conversation",
                expected="a template that writes messages one behind another",
                fix="use mode exact",
            )
        return whole[len(begin) :]

    def _answered(self, turn: Turn, on_prefill: Callable[[int], None] | None) -> Generator[str, None, None]:
        request = self.engine.submit_turn(turn)
        stream = Stream(self.engine.core, request, on_prefill)
        is_whole = is_stopped = False
        try:
            yield from stream
            self.engine.core.wait(lambda: request.held_sequence is None)
            is_whole = True
        except (GeneratorExit, KeyboardInterrupt):
            is_stopped = True
            raise
        finally:
            stream.close()
            self._record_end(turn, request, is_whole=is_whole, is_stopped=is_stopped)

    def _record_end(self, turn: Turn, request: Request, *, is_whole: bool, is_stopped: bool) -> None:
        result = request.result()
        if is_stopped:  # to the engine, an interrupt in the middle of a step is an error
            result = dataclasses.replace(result, finish_reason="cancelled", error=None)
        if is_whole:
            self.record(turn, result, request.state)
        else:
            self.record_stopped(turn, result)

    def _whole(self, answer: Generator[str, None, None]) -> Generation:
        for _ in answer:
            pass
        assert self.last is not None
        return self.last

    def _check_kind(self, is_other: bool, has: str, given: str) -> None:
        if is_other:
            raise UsageError(f"this conversation consists of {has}", got=given, expected=has, fix="begin another session")

    def _check_room(self, n_tokens: int) -> None:
        most = self.engine.manifest.config.max_positions
        if n_tokens >= most:
            raise UsageError(
                "the conversation does not fit into the model's context any more",
                got=f"{n_tokens} tokens with this message",
                expected=f"fewer than {most}, as an answer needs some",
                fix="start again (/reset in trt-kv chat), or send a shorter message",
            )


def _nothing_said(mode: str, system: str | None) -> SavedSession:
    messages = () if system is None else ({"role": "system", "content": system},)
    return SavedSession(mode=mode, messages=messages, token_ids=(), state=None)


class EngineSessions:
    """The methods of ``Engine`` for conversations that it remembers."""

    def session(self, *, mode: Mode = "exact", system: str | None = None, **options: Unpack[ChatKeywords]) -> Session:
        """Begin a conversation. ``options``: those of ``chat``, for all turns.

        ``mode`` "exact": every turn has the tokens of the whole history sent anew, of which the prefix cache has most.
        "compressed": every turn goes on from the tokens that the policy kept at the end of the last one, so memory stays within
        its budget, and what was dropped is lost for later turns. ``UsageError`` for "compressed" on a GPU under
        a policy that drops tokens.
        """
        return Session(cast("Engine", self), mode=mode, system=system, options=options)

    def load_session(self, path: str | Path, **options: Unpack[ChatKeywords]) -> Session:
        """The conversation that ``Session.save`` wrote; errors as for ``Session.load``."""
        session = Session(cast("Engine", self), options=options)
        session.load(path)
        return session
