"""Conversations that an engine remembers: each turn goes on from the turns before it (docs/decisions/0066-conversations.md).

Mode "exact": a turn has the tokens that the whole history, sent anew, would have; the prefix cache makes that cheap. Mode
"compressed": a turn goes on from what the last one kept, so the cache stays within the policy's budget.
"""

import copy
import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
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

if TYPE_CHECKING:
    from trt_kv.runtime.engine import Engine

Mode = Literal["exact", "compressed"]
_STAND_IN = {"role": "assistant", "content": "x"}
"""In place of an answer, to see what a template writes behind one: it may leave parts of an answer out later."""


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What a turn asks of the engine. ``history``: all tokens before the answer, of which ``prompt_ids`` are read now, behind
    ``begins_with``. ``messages``: all messages before the answer; none, if the conversation consists of prompts.
    """

    history: Sequence[int]
    prompt_ids: Sequence[int]
    params: SamplingParams
    messages: Sequence[Message]
    begins_with: SequenceState | None
    keeps_state: bool


class Session:
    """A conversation with an engine, of messages (``chat``, ``stream_chat``) or of prompts that continue each other
    (``generate``, ``stream``). Made by ``Engine.session``. Use it from one thread at a time.

    Between turns it holds no pages of the engine; in mode "compressed" it has a copy of what was kept. A turn that is refused
    leaves it as it was; an answer that is stopped stays as far as it got.

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
        self.mode: Mode = mode
        self.messages: list[Message] = []
        self.token_ids: list[int] = []
        """All tokens so far, as they were read and generated."""
        self.last: Generation | None = None
        """The result of the last turn."""
        self._state: SequenceState | None = None
        self._options = dict(options or {})
        self.reset(system)

    @property
    def system(self) -> str | None:
        """The system message; None: none of one's own, so that the template's default is used, if it has one."""
        return self.messages[0]["content"] if self.messages and self.messages[0]["role"] == "system" else None

    @property
    def n_bytes(self) -> int:
        """Memory of what is remembered, about."""
        texts = sum(len(str(message.get("content"))) for message in self.messages)
        return 8 * len(self.token_ids) + texts + (0 if self._state is None else self._state.n_bytes)

    @property
    def held_tokens(self) -> tuple[int, ...]:
        """Per layer, how many of ``token_ids`` the next turn goes on from without reading them; empty in mode "exact"."""
        return () if self._state is None else self._state.kv_len

    def reset(self, system: str | None = None) -> None:
        """Forget what was said, and begin with a system message, or with none."""
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.token_ids, self.last, self._state = [], None, None

    def fork(self) -> "Session":
        """A conversation that begins with this one, and goes on independently."""
        return copy.copy(self)  # what it refers to is replaced by a turn, never changed

    def chat(self, message: str, **options: Unpack[ChatKeywords]) -> Generation:
        """The answer to a message of the user; errors as for ``Engine.chat``."""
        return self._whole(self.stream_chat(message, **options))

    def stream_chat(
        self, message: str, *, on_prefill: Callable[[int], None] | None = None, **options: Unpack[ChatKeywords]
    ) -> Generator[str, None, None]:
        """Stream the answer to a message of the user. Closing the iterator stops it."""
        yield from self._answered(self.turn_of_messages([{"role": "user", "content": message}], **options), on_prefill)

    def generate(self, prompt: Prompt, **sampling: Unpack[SamplingOptions]) -> Generation:
        """The continuation of all prompts and continuations so far, and of ``prompt``; errors as for ``Engine.generate``."""
        return self._whole(self.stream(prompt, **sampling))

    def stream(
        self, prompt: Prompt, *, on_prefill: Callable[[int], None] | None = None, **sampling: Unpack[SamplingOptions]
    ) -> Generator[str, None, None]:
        """Stream the continuation of a prompt. Closing the iterator stops it."""
        yield from self._answered(self._turn_of_prompt(prompt, sampling), on_prefill)

    def turn_of_messages(self, messages: Sequence[Message], **options: Unpack[ChatKeywords]) -> Turn:
        """What the next messages ask of the engine, for servers; ``record`` its end."""
        self._check_kind(bool(self.token_ids) and len(self.messages) < 2, "prompts", "messages")
        given = cast(ChatKeywords, {**self._options, **options})
        whole = [*self.messages, *messages]
        ids, params = self.engine.chat_request(whole, None, **given)
        if self.mode == "compressed" and self.token_ids:
            ids = [*self.token_ids, *self._behind_answer(messages, given)]
        return self._turn(ids, params, whole)

    def record(self, turn: Turn, result: Generation, state: SequenceState | None) -> None:
        """Add a turn and its answer. ``state``: of its request, None if that did not end by itself: then the next turn reads
        its tokens again.
        """
        self.last = result
        self.token_ids = [*turn.history, *result.token_ids]
        if turn.messages:
            self.messages = [*turn.messages, {"role": "assistant", "content": result.text}]
        if state is not None:
            self._state = state

    def save(self, path: str | Path) -> None:
        """Write the conversation to a file, which ``Engine.load_session`` reads. A file that is there is replaced as a whole;
        nobody but the user can read it. ``UsageError`` if it cannot be written.
        """
        saved = SavedSession(mode=self.mode, messages=self.messages, token_ids=self.token_ids, state=self._state)
        write_session(Path(path), saved, self._fingerprint)

    def load(self, path: str | Path) -> None:
        """Become the conversation that ``save`` wrote. ``UsageError`` for a file that is none, is damaged, or is of another
        engine; nothing has changed then.
        """
        saved = read_session(Path(path), self._fingerprint)
        if saved.state is not None:
            self.engine.runner.states.check(saved.state)
        self.mode = cast(Mode, saved.mode)
        self.messages, self.token_ids, self._state, self.last = list(saved.messages), list(saved.token_ids), saved.state, None

    @property
    def _fingerprint(self) -> Mapping[str, Any]:
        """What a file must be of, to be read here."""
        return {"engine": self.engine.manifest.to_json()["digest"], "stored_as": self.engine.runner.pool.kv_dtype}

    def _turn_of_prompt(self, prompt: Prompt, sampling: SamplingOptions) -> Turn:
        self._check_kind(bool(self.messages), "messages", "prompts")
        given = {name: value for name, value in self._options.items() if name not in TemplateOptions.__annotations__} | sampling
        (params,) = params_of_each(1, None, cast(SamplingOptions, given), self.engine.default_sampling)
        is_part = isinstance(prompt, str) and bool(self.token_ids)
        encode: Callable[..., list[int]] = self.engine.encode_part if is_part else self.engine.encode
        new = encode(prompt, parse_special_tokens=params.parse_special_tokens)
        return self._turn([*self.token_ids, *new], params, ())

    def _turn(self, history: Sequence[int], params: SamplingParams, messages: Sequence[Message]) -> Turn:
        check_one_sample(params)
        self._check_room(len(history))
        n_before = 0 if self._state is None else self._state.num_computed_tokens
        return Turn(
            history=history,
            prompt_ids=history[n_before:],
            params=params,
            messages=messages,
            begins_with=self._state,
            keeps_state=self.mode == "compressed",
        )

    def _behind_answer(self, messages: Sequence[Message], options: ChatKeywords) -> list[int]:
        """The tokens between the last answer and the next one: the end of the one, the new messages, the head of the other."""
        of_template = cast(TemplateOptions, {k: v for k, v in options.items() if k in TemplateOptions.__annotations__})
        before = [*self.messages[:-1], _STAND_IN]
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
        if result.text or is_whole:
            self.record(turn, result, request.state if is_whole else None)
        else:
            self.last = result

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


class EngineSessions:
    """The methods of ``Engine`` for conversations that it remembers."""

    def session(self, *, mode: Mode = "exact", system: str | None = None, **options: Unpack[ChatKeywords]) -> Session:
        """Begin a conversation. ``options``: those of ``chat``, for all turns.

        ``mode`` "exact": every turn has the tokens of the whole history sent anew, of which the prefix cache has most.
        "compressed": every turn goes on from the tokens that the policy kept at the end of the last one, so memory stays within
        its budget, and what was dropped is lost for later turns. ``UsageError`` for "compressed" if the cache is not in memory
        of the host.
        """
        return Session(cast("Engine", self), mode=mode, system=system, options=options)

    def load_session(self, path: str | Path, **options: Unpack[ChatKeywords]) -> Session:
        """The conversation that ``Session.save`` wrote; errors as for ``Session.load``."""
        session = Session(cast("Engine", self), options=options)
        session.load(path)
        return session
