"""``python -m benchmarks.gpu [NAME ...] [--quick]``: measure the kernels on this machine's GPU, print tables, write results."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.harness import load, save, show

SECTIONS = (
    *("bandwidth", "decode_attention", "prefill_scores", "recall_copies", "page_choice", "freekv", "decode_steps", "sampling"),
)
RESULTS = Path(__file__).parent.parent / "results"
ROOT = RESULTS.parent.parent
LIMIT_S = 570
"""Time limit of all sections together, in seconds."""


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(SECTIONS))
@click.option("--quick", is_flag=True, help="Tiny sizes, on the CPU too, to check that everything works; writes nothing.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the results instead of the default one."
)
@click.option("--saved", is_flag=True, help="Measure nothing; print the last results.")
def main(names: tuple[str, ...], quick: bool, out: Path | None, saved: bool) -> None:
    """Measure the sections NAMES (all of them by default) and write gpu_NAME.json for each. Takes less than ten minutes.

    Each section runs in its own process; one that fails, or whose checks fail, writes nothing and does not stop the others.
    """
    console = Console(width=None if sys.stdout.isatty() else 160)
    end = time.monotonic() + LIMIT_S
    failed = []
    if not saved and not quick and not _has_gpu():
        raise click.ClickException("there is no CUDA device here. Try the command with --quick, on the CPU.")
    for name in names or SECTIONS:
        console.rule(name)
        path = (out or RESULTS) / f"gpu_{name}.json"
        if not saved:
            with tempfile.TemporaryDirectory(prefix="trt-kv-bench-") as folder:
                document = _section(name, Path(folder) / "document.json", quick=quick, seconds=end - time.monotonic())
            if document is None:
                failed.append(name)
                continue
            if out is not None or not quick:
                save(document, path)
        else:
            document = load(path)
        console.print(", ".join(f"{key} {value}" for key, value in document["gpu"].items()))
        show(document, console)
    if failed:
        raise click.ClickException(f"failed: {', '.join(failed)}; their output is above")


def _section(name: str, file: Path, *, quick: bool, seconds: float) -> dict[str, Any] | None:
    """The document of a section; None if it failed or did not end in time."""
    command = [sys.executable, "-m", "benchmarks.gpu.section", name, str(file), *(["--quick"] if quick else [])]
    try:
        outcome = subprocess.run(command, check=False, cwd=ROOT, timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        click.echo(f"{name} was stopped: all sections together have {LIMIT_S} s", err=True)
        return None
    return load(file) if outcome.returncode == 0 else None


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    main()
