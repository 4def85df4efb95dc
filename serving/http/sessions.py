"""Conversations that the server remembers for its clients: our extension ``session`` of chats."""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from trt_kv.errors import TrtKvError
from trt_kv.runtime.async_engine import AsyncEngine
from trt_kv.runtime.async_session import AsyncSession
from trt_kv.runtime.turn import Turn
from trt_kv.serving.http.bodies import SessionBody
from trt_kv.serving.http.refusals import RefusedError, refusal_of
from trt_kv.serving.http.running import Running
from trt_kv.serving.http.settings import ServerSettings

Key = tuple[str, str]
"""The digest of an API key, and the id that a client gave the conversation."""


@dataclass(kw_only=True, eq=False)
class Held:
    """A conversation. ``used``: when it was last used, in seconds of ``time.monotonic``."""

    id: str
    session: AsyncSession
    used: float

    @property
    def in_turn(self) -> bool:
        """Whether a turn runs."""
        return self.session.session.in_turn

    @property
    def n_turns(self) -> int:
        """Turns that have been answered."""
        return self.session.session.n_turns

    @property
    def n_bytes(self) -> int:
        return self.session.session.n_bytes

    async def record(self, turn: Turn, running: Running) -> None:
        """Add a turn whose answer has ended."""
        await self.session.record(turn, running.only)

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "mode": self.session.mode, "turns": self.n_turns}


class Sessions:
    """The conversations of one server. Used by its event loop only."""

    def __init__(self, engine: AsyncEngine, settings: ServerSettings, *, now: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._settings = settings
        self._now = now
        self._held: OrderedDict[Key, Held] = OrderedDict()

    def take(self, key_digest: str, wanted: SessionBody) -> Held:
        """The conversation for a turn, a new one if there is none of its id; ``give_back`` it afterwards.

        ``RefusedError`` (409) while another turn of it runs, if it has another mode, or if it has not had ``wanted.turns``:
        then the client knows of turns that the server has forgotten.
        """
        self._forget_old()
        key = (key_digest, wanted.id)
        held = self._held.get(key)
        if held is not None and held.in_turn:
            raise _conflict("a turn of this session is being answered: wait for its end", "session_in_turn")
        if held is not None and wanted.mode not in (None, held.session.mode):
            raise _conflict(f"this session has mode {held.session.mode!r}", "session_mode")
        n_turns = 0 if held is None else held.n_turns
        if wanted.turns is not None and wanted.turns != n_turns:
            raise _conflict(f"this session has had {n_turns} turns here: send all messages in a new one", "session_turns")
        if held is None:
            try:
                session = self._engine.session(mode=wanted.mode or "compressed")
            except TrtKvError as error:
                raise refusal_of(error, {"mode": "session.mode"}, default_param="session.mode") from error
            held = self._held[key] = Held(id=wanted.id, session=session, used=self._now())
        held.session.session.begin_turn()
        held.used = self._now()
        self._held.move_to_end(key)
        return held

    def give_back(self, held: Held) -> None:
        """Take in a conversation after a turn; the least recently used ones are forgotten if there is no room for all."""
        held.session.session.end_turn()
        held.used = self._now()
        self._forget_old()
        over = sum(one.n_bytes for one in self._held.values()) - self._settings.session_bytes
        for key, one in list(self._held.items()):
            if over <= 0 and len(self._held) <= self._settings.max_sessions:
                return
            if not one.in_turn:
                over -= one.n_bytes
                del self._held[key]

    def _forget_old(self) -> None:
        """Forget what nobody has used for long, and conversations without a turn, whose first one failed."""
        oldest = self._now() - self._settings.session_seconds
        for key, held in list(self._held.items()):
            if not held.in_turn and (held.used < oldest or not held.n_turns):
                del self._held[key]


def _conflict(text: str, code: str) -> RefusedError:
    return RefusedError(409, text, param="session", code=code)
