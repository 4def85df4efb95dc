"""What a long call tells while it runs: how far it is, and what a user should know."""

from collections.abc import Callable

OnProgress = Callable[[str, int, int], None]
"""Told (stage, done, total) while something long runs."""

OnNote = Callable[[str], None]
"""Told one line of text that is neither an error nor a result, e.g. which prompts are used where none were named."""


def ignore(*_: object) -> None:
    """Takes what a callback is told, and does nothing."""
