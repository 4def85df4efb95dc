"""What is printed, so that any terminal can show it."""

import contextlib
import io
import sys
from collections.abc import Iterator

import click

from trt_kv.printable import printable


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
