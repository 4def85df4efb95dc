"""A rendered conversation, in which texts of messages are told from what the template wrote around them."""

import functools
import itertools
import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from trt_kv.errors import UsageError

_CANDIDATES = (range(0xFDD0, 0xFDF0), range(0xE000, 0xF900))
"""Characters that Unicode keeps for the use inside of programs. Python and JSON in ASCII escape them in the same way."""


@dataclass(frozen=True)
class RenderedChat:
    """``pieces``: texts, and whether each is text only: control tokens written in it do not count. No control token is formed
    by the end of a piece and the beginning of the next.
    """

    pieces: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        """The whole text, as transformers renders it."""
        return "".join(text for text, _ in self.pieces)

    def followed_by(self, text: str) -> "RenderedChat":
        """The same with ``text`` behind it."""
        if self.pieces and not self.pieces[-1][1]:
            return RenderedChat((*self.pieces[:-1], (self.pieces[-1][0] + text, False)))
        return RenderedChat((*self.pieces, (text, False)))


class Marks:
    """Marks control tokens in the texts of messages before a template sees them, and finds them in what it made of them.

    ``special``: tokens that are marked in every text. ``others``: those that are marked except in the assistant's texts, which
    are the model's own.
    """

    def __init__(self, special: Collection[str], others: Collection[str], taken: Iterable[str]) -> None:
        whole = "\0".join(taken)
        candidates = map(chr, itertools.chain(*_CANDIDATES))
        free = (mark for mark in candidates if mark not in whole and _escaped(mark) not in whole)
        chosen = list(itertools.islice(free, 3))
        if len(chosen) < 3:
            raise UsageError("messages have every character for private use", expected="text")
        self._begin, self._end, self.tail = chosen
        """``tail``: a character that is in no text."""
        self._special = pattern_of(frozenset(special))
        self._any = pattern_of(frozenset([*special, *others]))

    def marked(self, value: Any, *, own: bool = False) -> Any:
        """``value``, plain data, with marks in its texts; ``own``: the model's own."""
        if isinstance(value, str):
            return (self._special if own else self._any).sub(lambda match: f"{self._begin}{match[0]}{self._end}", value)
        if isinstance(value, dict):
            return {self.marked(key, own=own): self.marked(item, own=own) for key, item in value.items()}
        if isinstance(value, list):
            return self._separated(value, [self.marked(item, own=own) for item in value], own=own)
        return value

    def _separated(self, parts: list[Any], marked: list[Any], *, own: bool) -> list[Any]:
        """Parts of a message, with a mark where two would form a control token, as templates put them one after the other."""
        if len(parts) < 2 or not all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in parts):
            return marked
        starts = list(itertools.accumulate(len(part["text"]) for part in parts))
        whole = "".join(part["text"] for part in parts)
        for match in (self._special if own else self._any).finditer(whole):
            for index, start in enumerate(starts[:-1], start=1):
                if match.start() < start < match.end():
                    marked[index]["text"] = self._begin + marked[index]["text"]
        return marked

    def read(self, rendered: str, is_control: Callable[[str, str], bool]) -> RenderedChat:
        """The pieces of a text that a template rendered. ``is_control(token, written)``: whether a marked token would end a
        turn or the like; ``written`` is the text that the template wrote itself.
        """
        for mark in (self._begin, self._end):  # a template may write JSON in ASCII
            rendered = rendered.replace(_escaped(mark), mark)
        marked = re.compile(f"{self._begin}({self._any.pattern}){self._end}|[{self._begin}{self._end}]", re.DOTALL)
        written = marked.sub(self._end, rendered)
        return RenderedChat(tuple(_joined(self._pieces(rendered, marked, lambda token: is_control(token, written)))))

    @staticmethod
    def _pieces(rendered: str, marked: re.Pattern[str], is_control: Callable[[str], bool]) -> Iterator[tuple[str, bool]]:
        at = 0
        for match in marked.finditer(rendered):
            yield rendered[at : match.start()], False
            token = match[1] or ""
            yield token, not token or is_control(token)
            at = match.end()
        yield rendered[at:], False


@functools.lru_cache(maxsize=32)
def pattern_of(tokens: frozenset[str]) -> re.Pattern[str]:
    """Finds any of ``tokens``, as tokenizers do: the longest of those that begin first."""
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _escaped(character: str) -> str:
    """A character as JSON writes it in ASCII."""
    return json.dumps(character)[1:-1]


def _joined(pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """The pieces, adjacent ones of the same kind as one; empty ones only where they separate others."""
    for is_literal, group in itertools.groupby(pieces, key=lambda piece: piece[1]):
        text = "".join(text for text, _ in group)
        if text or is_literal:
            yield text, is_literal
