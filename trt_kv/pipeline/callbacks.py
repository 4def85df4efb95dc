"""Callbacks of long calls: progress, and notes for the user."""

from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]
"""Called with (stage, done, total) during a long operation."""

OnNote = Callable[[str], None]
"""Called with one line of text that is neither an error nor a result, e.g. which prompts are used if none were given."""


def ignore(*_: object) -> None:
    """A callback that does nothing."""
