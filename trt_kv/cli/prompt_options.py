"""The prompt of a command: an argument, a file, or standard input."""

import functools
import sys
from pathlib import Path
from typing import Any

import click

from trt_kv.cli.options import CommandFunction, utf8_text
from trt_kv.errors import UsageError
from trt_kv.text_file import read_text, text_from_bytes


def prompt_options(command: CommandFunction) -> CommandFunction:
    """Add PROMPT and --prompt-file; ``command`` receives ``prompt`` and ``prompt_file``, for ``read_prompt``."""

    @click.argument("prompt", callback=utf8_text, required=False)
    @click.option(
        "--prompt-file",
        type=click.Path(exists=True, dir_okay=False, allow_dash=True),
        metavar="FILE",
        help="Read the prompt from FILE.",
    )
    @functools.wraps(command)
    def collected(**given: Any) -> None:
        command(**given)

    return collected


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt from the argument, from a file or from standard input (``-``); ``UsageError`` unless exactly one is given."""
    if (prompt is None) == (prompt_file is None):
        raise UsageError(
            "exactly one prompt is needed",
            got="no prompt" if prompt is None else "a prompt and --prompt-file",
            expected="PROMPT, PROMPT - for standard input, or --prompt-file FILE",
        )
    if prompt is not None and prompt != "-":
        return prompt
    if prompt_file is not None and prompt_file != "-":
        text = read_text(Path(prompt_file), what="the file with the prompt")
    elif sys.stdin is None:
        raise UsageError("the prompt cannot be read", got="a closed standard input", fix="pass PROMPT, or --prompt-file FILE")
    else:
        text = text_from_bytes(sys.stdin.buffer.read(), what="the prompt", where="standard input")
    return text.removesuffix("\n")
