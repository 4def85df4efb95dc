"""Progress on the terminal's error stream: a bar per stage, gone when it is done; silent where nobody watches."""

import contextlib
from collections.abc import Callable, Iterator

OnProgress = Callable[[str, int, int], None]
"""Told (stage, done, total)."""


@contextlib.contextmanager
def progress_bars() -> Iterator[OnProgress]:
    """A callback that draws one bar per stage it is told of."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        tasks = {}

        def on_progress(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield on_progress
