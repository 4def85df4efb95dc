"""Progress bars and notes on standard error. One bar per stage, removed at the end; none if it is not a terminal."""

import contextlib
from collections.abc import Iterator

from trt_kv.cli.output import say
from trt_kv.pipeline.callbacks import OnProgress
from trt_kv.printable import printable


def say_note(text: str) -> None:
    """Print one line on standard error."""
    say(text, err=True)


@contextlib.contextmanager
def progress_bars() -> Iterator[OnProgress]:
    """A callback that draws one bar per stage."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
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
                tasks[stage] = progress.add_task(printable(stage), total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield on_progress
