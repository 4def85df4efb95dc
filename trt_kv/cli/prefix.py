"""``trt-kv prefix``: prompts in files, from which other prompts that begin alike continue."""

import contextlib
import dataclasses
import json
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from trt_kv.cli.options import any_path, debug_option, digest_option
from trt_kv.cli.output import say
from trt_kv.cli.progress import progress_bars
from trt_kv.cli.prompt_options import prompt_options, read_prompt
from trt_kv.cli.run_options import device_options, resource_options
from trt_kv.cli.sizes import bytes_as_text
from trt_kv.errors import CapacityError, UsageError
from trt_kv.pipeline.plans import DeviceChoice, ResourceChoice
from trt_kv.pipeline.prefixes import PrefixRemoval, list_prefixes, remove_prefixes

if TYPE_CHECKING:
    from trt_kv.runtime.prefix.kept import KeptPrefix

_SHOWN = 12
"""Digits of keys and digests in the table."""
_engine_option = click.option(
    "--engine", metavar="DIGEST", help="Only prefixes of the engine with this digest, or beginning of one. Default: of any."
)


@click.group("prefix", short_help="Read prompts into files, for others that begin alike.")
@debug_option
def command() -> None:
    """Read the beginning of prompts (a system prompt, a document, examples) into a folder of files. Commands that run the same
    engine with the same --prefix-store continue from there, with the tokens that they would generate anyway.

    \b
    Examples:
      trt-kv prefix add engines/smollm2-prefixkv --prompt-file manual.txt --prefix-store ~/prefixes
      trt-kv generate engines/smollm2-prefixkv --prompt-file manual-and-question.txt --prefix-store ~/prefixes
      trt-kv prefix list ~/prefixes
      trt-kv prefix remove ~/prefixes 3f07a2b41c9d
    """


@command.command("add", short_help="Read a prompt into a folder.")
@click.argument("engine", type=any_path)
@prompt_options
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


@command.command("list", short_help="Show what a folder holds.")
@click.argument("folder", type=any_path)
@_engine_option
@click.option("--json", "as_json", is_flag=True, help="Write JSON: whole keys and digests, times in seconds since 1970.")
@debug_option
def list_(*, folder: Path, engine: str | None, as_json: bool) -> None:
    """Show the prefixes in FOLDER, which --prefix-store named: for each prompt the most that is kept of its beginning, the last
    used one first.

    "Alone" are the bytes that its removal frees: prompts that begin alike share files.

    \b
    Example:
      trt-kv prefix list ~/prefixes
    """
    found = list_prefixes(folder, engine=engine)
    if as_json:
        rest = {"other_files": len(found.others), "other_bytes": found.other_bytes, "bytes": found.n_bytes}
        document = {"prefixes": [dataclasses.asdict(one) for one in found.prefixes], **rest}
        say(json.dumps(document, indent=1))
        return
    if found.prefixes:
        say(f"{'key':<{_SHOWN}} {'tokens':>7} {'bytes':>10} {'alone':>10} {'last used':<16} policy, engine")
    for one in found.prefixes:
        say(_line(one))
    say(f"[{len(found.prefixes)} prefixes; all files of the folder: {bytes_as_text(found.n_bytes)}]", err=True)
    if found.others:
        others = f"{len(found.others)} files, {bytes_as_text(found.other_bytes)}"
        say(f"[{others}, are of another version or user, or damaged; remove --all deletes them]", err=True)


def _line(one: "KeptPrefix") -> str:
    used = datetime.fromtimestamp(one.used).astimezone().strftime("%Y-%m-%d %H:%M")
    sizes = f"{bytes_as_text(one.n_bytes):>10} {bytes_as_text(one.own_bytes):>10}"
    engine = one.engine.removeprefix("sha256:")[:_SHOWN]
    note = "" if one.is_whole else "; its beginning is gone, so nothing finds it"
    return f"{one.key[:_SHOWN]} {one.tokens:>7} {sizes} {used} {one.policy}, {engine}{note}"


@command.command("remove", short_help="Delete prefixes from a folder.")
@click.argument("folder", type=any_path)
@click.argument("keys", nargs=-1, metavar="[KEY]...")
@click.option("--all", "everything", is_flag=True, help="Delete all prefixes, and what is left of other versions.")
@_engine_option
@debug_option
def remove(*, folder: Path, keys: tuple[str, ...], everything: bool, engine: str | None) -> None:
    """Delete from FOLDER the prefixes whose keys, as list shows them, begin with KEY. Files that other prefixes begin with
    stay. Engines that use the folder go on, and read again what is gone.

    \b
    Examples:
      trt-kv prefix remove ~/prefixes 3f07a2b41c9d
      trt-kv prefix remove ~/prefixes --engine sha256:9c2e51
      trt-kv prefix remove ~/prefixes --all
    """
    n_removed, n_bytes = remove_prefixes(PrefixRemoval(folder=folder, keys=keys, everything=everything, engine=engine))
    say(f"[removed: {n_removed} prefixes, {bytes_as_text(n_bytes)}]", err=True)
