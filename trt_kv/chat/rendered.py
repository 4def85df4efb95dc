"""A rendered conversation, in which texts of messages are told from what the template wrote around them."""

import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

_CANDIDATES = (range(0xFDD0, 0xFDF0), range(0xF0000, 0xFFFFE))
"""Characters that Unicode keeps for the use inside of programs."""


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
        used = set(itertools.chain.from_iterable(taken))
        free = (chr(code) for code in itertools.chain(*_CANDIDATES) if chr(code) not in used)
        self._begin, self._end, self.tail = itertools.islice(free, 3)
        """``tail``: a character that is in no text."""
        self._special = pattern_of(special)
        self._any = pattern_of([*special, *others])

    def marked(self, value: Any, *, own: bool = False) -> Any:
        """``value``, plain data, with marks in its texts; ``own``: the model's own."""
        if isinstance(value, str):
            return (self._special if own else self._any).sub(lambda match: f"{self._begin}{match[0]}{self._end}", value)
        if isinstance(value, dict):
            return {key: item if key in ("role", "type") else self.marked(item, own=own) for key, item in value.items()}
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


def pattern_of(tokens: Collection[str]) -> re.Pattern[str]:
    """Finds any of ``tokens``, as tokenizers do: the longest of those that begin first."""
    return re.compile("|".join(map(re.escape, sorted(set(tokens), key=len, reverse=True))) or "(?!)")


def _joined(pieces: Iterable[tuple[str, bool]]) -> Iterator[tuple[str, bool]]:
    """The pieces, adjacent ones of the same kind as one; empty ones only where they separate others."""
    for is_literal, group in itertools.groupby(pieces, key=lambda piece: piece[1]):
        text = "".join(text for text, _ in group)
        if text or is_literal:
            yield text, is_literal
