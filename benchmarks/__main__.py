"""``python -m benchmarks [NAME ...] [--quick]``: measure, print tables, write results."""

import functools
import importlib
import os
import tempfile
from pathlib import Path

import click
from rich.console import Console

from benchmarks.harness import measured, save, show

NAMES = ("split_vs_monolithic", "decode_speed", "attention_kernels", "prefill_scores_cost", "prefill_memory")
RESULTS = Path(__file__).parent / "results"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--quick", is_flag=True, help="Small sizes and few rounds: shows that everything works; nothing is written.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the results instead of the usual one."
)
def main(names: tuple[str, ...], quick: bool, out: Path | None) -> None:
    """Measure the benchmarks NAMES (all of them by default) and write NAME.json for each."""
    # As the command line does, and before any benchmark loads torch.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    console = Console()
    for name in names or NAMES:
        module = importlib.import_module(f"benchmarks.{name}")
        console.rule(name)
        with tempfile.TemporaryDirectory(prefix="trt-kv-bench-") as folder:
            document = measured(functools.partial(module.run, Path(folder), quick=quick))
        show(document, console)
        if out is not None or not quick:
            path = (out or RESULTS) / f"{name}.json"
            save(document, path)
            console.print(f"written to {path}")


if __name__ == "__main__":
    main()
