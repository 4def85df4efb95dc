"""``python -m benchmarks [NAME ...] [--quick]``: measure, print tables, write results."""

import functools
import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from benchmarks.harness import load, measured, save, show
from trt_kv.errors import TrtKvError
from trt_kv.openmp import let_threads_wait

MODULES = {
    "split_vs_monolithic": "benchmarks.speed.split_vs_monolithic",
    "decode_speed": "benchmarks.speed.decode_speed",
    "sampling": "benchmarks.speed.sampling",
    "attention_kernels": "benchmarks.speed.attention_kernels",
    "packed_products": "benchmarks.speed.packed_products",
    "prefill_scores_cost": "benchmarks.speed.prefill_scores_cost",
    "prefill_memory": "benchmarks.speed.prefill_memory",
    "weights_accuracy": "benchmarks.quality.weights_accuracy",
    "kvpress_overlap": "benchmarks.kvpress.overlap",
    "kv_types": "benchmarks.quality.kv_types",
    "bounded_reading": "benchmarks.quality.bounded_reading",
    "page_ranking": "benchmarks.quality.page_ranking",
    "recall_tasks": "benchmarks.quality.recall_tasks",
    "page_choice": "benchmarks.speed.page_choice",
    "advice": "benchmarks.speed.advice",
    "recall_memory": "benchmarks.speed.recall_memory",
    "recall_speed": "benchmarks.speed.recall_speed",
    "recall_steps": "benchmarks.speed.recall_steps",
    "recall_timeline": "benchmarks.speed.recall_timeline",
    "serving_core": "benchmarks.serving.serving_core",
    "prefix_reuse": "benchmarks.serving.prefix_reuse",
}
"""The benchmarks by name, in the order in which they run; each module has a function ``run``."""
RESULTS = Path(__file__).parent / "results"


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(tuple(MODULES)))
@click.option("--quick", is_flag=True, help="Small sizes and few rounds, to check that everything works; writes nothing.")
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="Folder for the results instead of the default one."
)
@click.option("--saved", is_flag=True, help="Measure nothing; print the last results.")
def main(names: tuple[str, ...], quick: bool, out: Path | None, saved: bool) -> None:
    """Measure the benchmarks NAMES (all of them by default) and write NAME.json for each."""
    # As the command line does. It must be set before a benchmark loads torch.
    let_threads_wait()
    console = Console()
    try:
        for name in names or MODULES:
            console.rule(name)
            path = (out or RESULTS) / f"{name}.json"
            if saved:
                show(load(path), console)
                continue
            document = _measured(name, quick)
            show(document, console)
            if out is not None or not quick:
                save(document, path)
                console.print(f"written to {path}")
    except TrtKvError as error:
        raise click.ClickException(str(error)) from error


def _measured(name: str, quick: bool) -> dict[str, Any]:
    module = importlib.import_module(MODULES[name])
    with tempfile.TemporaryDirectory(prefix="trt-kv-bench-") as folder:
        return measured(functools.partial(module.run, Path(folder), quick=quick))


if __name__ == "__main__":
    # These have options of their own, and install other engines: never among "all of them".
    if sys.argv[1:2] == ["peers"]:
        from benchmarks.peers.__main__ import main as compare_with_peers

        compare_with_peers(sys.argv[2:])
    if sys.argv[1:2] == ["serving-peers"]:
        from benchmarks.serving_peers.__main__ import main as compare_servers

        compare_servers(sys.argv[2:])
    main()
