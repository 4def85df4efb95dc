"""Progress and notes on the terminal's error stream. A bar per stage, gone when it is done; none where nobody watches."""

import contextlib
from collections.abc import Iterator

import click

from trt_kv.pipeline.callbacks import OnProgress


def say_note(text: str) -> None:
    """One line on the error stream."""
    click.echo(text, err=True)


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
