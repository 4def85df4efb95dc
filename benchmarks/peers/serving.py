"""The loop of a runner, and its clock."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

from benchmarks.peers.protocol import Answer, Job, Refusal, Setup, to_line

JOULES = Path("/sys/class/powercap/intel-rapl:0/energy_uj")
Run = Callable[[Job], Answer]


class CannotDoError(Exception):
    """A job or a set-up that this engine cannot do, with the reason."""


class Clock:
    """Times of one request: call ``token`` as each token appears."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._tokens: list[float] = []
        self._joules: list[float | None] = []

    def token(self) -> None:
        """Note a token."""
        self._tokens.append(time.perf_counter())
        self._joules.append(joules())

    def answer(self, *, is_synthetic: bool = False, kv_bytes: int | None = None) -> Answer:
        """What was noted. ``is_synthetic``: the first token only starts the clock."""
        if len(self._tokens) < 2:
            raise CannotDoError(f"{len(self._tokens)} tokens were generated")
        first, last = self._joules[0], self._joules[-1]
        return Answer(
            first_token_s=None if is_synthetic else self._tokens[0] - self._start,
            token_ms=[1e3 * (b - a) for a, b in pairwise(self._tokens)],
            kv_bytes=kv_bytes,
            joules=None if first is None or last is None else last - first,
        )


def serve(set_up: Callable[[Setup], tuple[dict[str, Any], Callable[[Any], Any]]], job: type[Any] = Job) -> None:
    """Answer the lines of standard input until it ends. ``set_up`` loads the model: facts, and what runs a ``job``."""
    with _private_output() as out:
        run: Callable[[Any], Any] | None = None
        for line in sys.stdin:
            try:
                if run is None:
                    facts, run = set_up(Setup(**json.loads(line)))
                    _say(out, to_line(facts))
                else:
                    _say(out, to_line(run(job(**json.loads(line)))))
            except Exception as error:  # noqa: BLE001  (whatever an engine raises is the reason)
                _say(out, to_line(Refusal(why=f"{type(error).__name__}: {error}".strip()[:600])))


@contextmanager
def _private_output() -> Iterator[TextIO]:
    """Standard output for the protocol alone: what libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        yield out


def _say(out: TextIO, line: str) -> None:
    out.write(line)
    out.flush()


def joules() -> float | None:
    """Energy that the processor has used since some moment, where the machine tells."""
    try:
        return int(JOULES.read_text()) / 1e6
    except (OSError, ValueError):
        return None
