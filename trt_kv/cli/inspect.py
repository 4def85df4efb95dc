"""``trt-kv inspect``: show what is in an engine."""

from pathlib import Path

import click

from trt_kv.cli.options import any_path, debug_option, digest_option
from trt_kv.cli.output import say


@click.command("inspect", short_help="Show what is in an engine.")
@click.argument("engine", type=any_path)
@digest_option
@debug_option
def command(*, engine: Path, digest: str | None) -> None:
    """Show an engine's model, policy, budgets per layer and sizes, and where each number came from.

    \b
    Example:
      trt-kv inspect engines/llama3-prefixkv
    """
    from trt_kv.cli.inspection import describe_engine

    say(describe_engine(engine, digest=digest))
