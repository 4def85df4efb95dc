"""What is printed, so that any terminal can show it: control characters of names and files are shown as escapes."""

import contextlib
import io
import sys
import unicodedata
from collections.abc import Iterator

import click

_BIDIRECTIONAL = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""Characters that reorder the text around them."""


def printable(text: str, *, lines: bool = False) -> str:
    """``text`` with control characters as escapes such as \\x1b; with ``lines`` except line ends."""
    return "".join(
        _shown(character) if _controls(character) and not (lines and character == "\n") else character for character in text
    )


def say(text: str, *, err: bool = False) -> None:
    """Print lines of text, on standard error if ``err``."""
    click.echo(printable(text, lines=True), err=err)


@contextlib.contextmanager
def lenient_output() -> Iterator[None]:
    """Inside the block, characters that the terminal's encoding lacks are written as escapes and not an error."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        yield
        return
    errors = stream.errors
    stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        stream.reconfigure(errors=errors)


def _controls(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in _BIDIRECTIONAL


def _shown(character: str) -> str:
    return character.encode("unicode_escape").decode()
