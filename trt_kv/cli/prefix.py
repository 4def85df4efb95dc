"""``trt-kv prefix``: prompts in files, from which other prompts that begin alike continue."""

import contextlib
from pathlib import Path

import click

from trt_kv.cli.generate import read_prompt
from trt_kv.cli.options import any_path, debug_option, digest_option, utf8_text
from trt_kv.cli.output import say
from trt_kv.cli.progress import progress_bars
from trt_kv.cli.run_options import device_options, resource_options
from trt_kv.errors import CapacityError, UsageError
from trt_kv.pipeline.plans import DeviceChoice, ResourceChoice


@click.group("prefix", short_help="Read prompts into files, for others that begin alike.")
@debug_option
def command() -> None:
    """Read the beginning of prompts (a system prompt, a document, examples) into a folder of files. Commands that run the same
    engine with the same --prefix-store continue from there, with the tokens that they would generate anyway.

    \b
    Examples:
      trt-kv prefix add engines/smollm2-prefixkv --prompt-file manual.txt --prefix-store ~/prefixes
      trt-kv generate engines/smollm2-prefixkv --prompt-file manual-and-question.txt --prefix-store ~/prefixes
    """


@command.command("add", short_help="Read a prompt into a folder.")
@click.argument("engine", type=any_path)
@click.argument("prompt", callback=utf8_text, required=False)
@click.option(
    "--prompt-file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    metavar="FILE",
    help="Read the prompt from FILE.",
)
@click.option(
    "--cache-salt", default="", metavar="TEXT", help="Only requests with this salt find the prompt. Default: those without."
)
@resource_options
@device_options
@digest_option
@debug_option
def add(
    *,
    engine: Path,
    prompt: str | None,
    prompt_file: str | None,
    cache_salt: str,
    resources: ResourceChoice,
    on: DeviceChoice,
    digest: str | None,
) -> None:
    """Read PROMPT with ENGINE into the files of --prefix-store, which must be given. Only whole chunks are kept.

    \b
    Example:
      trt-kv prefix add engines/smollm2-prefixkv --prompt-file manual.txt --prefix-store ~/prefixes
    """
    if resources.prefix_store is None:
        raise UsageError("there is nowhere to keep the prompt", fix="give a folder with --prefix-store FOLDER")
    from trt_kv.runtime.engine import Engine

    text = read_prompt(prompt, prompt_file)
    with contextlib.ExitStack() as opened:
        on_progress = opened.enter_context(progress_bars())
        options = {**on.options, **resources.options()}
        loaded = opened.enter_context(Engine.load(engine, digest=digest, on_progress=on_progress, **options))
        ids = loaded.encode(text)
        on_progress("reading the prompt", 0, 1)
        n_read = loaded.pin(ids, cache_salt=cache_salt)
        n_stored = 0 if loaded.core.prefixes is None else loaded.core.prefixes.n_stored(ids, cache_salt)
        on_progress("reading the prompt", 1, 1)
    if n_stored < n_read:
        raise CapacityError(
            "the prompt was read, but not all of it could be written",
            got=f"{n_stored} tokens in {resources.prefix_store}",
            expected=f"{n_read} tokens",
            fix="free space on that disk, or choose another with --prefix-store",
        )
    say(f"[{n_stored} of {len(ids)} prompt tokens are in {resources.prefix_store}]", err=True)
