"""``trt-kv generate``: continue a prompt with an engine."""

from pathlib import Path
from typing import Any

import click

from trt_kv.cli.chat_options import chat_options
from trt_kv.cli.generation import ChatChoice, RunOptions, stream_text
from trt_kv.cli.options import any_path, debug_option, digest_option
from trt_kv.cli.output import say
from trt_kv.cli.prompt_options import prompt_options, read_prompt
from trt_kv.cli.run_options import device_options, resource_options
from trt_kv.cli.sampling_options import model_defaults_option, sampling_options
from trt_kv.errors import UsageError
from trt_kv.pipeline.plans import DeviceChoice, ResourceChoice


@click.command("generate", short_help="Continue a prompt with an engine.")
@click.argument("engine", type=any_path)
@prompt_options
@click.option(
    "--chat",
    "is_message",
    is_flag=True,
    help="PROMPT is a message: it is put into the engine's chat template, and the text is the answer.",
)
@chat_options
@sampling_options
@model_defaults_option
@click.option(
    "--trace", type=any_path, metavar="FILE", help="Write a timeline of the run, as JSON for chrome://tracing or Perfetto."
)
@click.option(
    "--special-tokens/--no-special-tokens",
    "parse_special_tokens",
    default=True,
    show_default=True,
    help="Read special tokens in the prompt, such as <eos>, as control tokens; with --no-, as text like any other.",
)
@resource_options
@device_options
@digest_option
@debug_option
def command(
    *,
    engine: Path,
    prompt: str | None,
    prompt_file: str | None,
    is_message: bool,
    system: str | None,
    of_template: dict[str, Any],
    sampling: dict[str, Any],
    model_defaults: bool,
    trace: Path | None,
    parse_special_tokens: bool,
    resources: ResourceChoice,
    on: DeviceChoice,
    digest: str | None,
) -> None:
    """Continue PROMPT with ENGINE and stream the text. If PROMPT is -, it is read from standard input.

    \b
    Examples:
      trt-kv generate engines/llama3-prefixkv "the keeper of the tower"
      trt-kv generate engines/llama3-prefixkv - < prompt.txt
      trt-kv generate engines/llama3-prefixkv --prompt-file long.txt --prefix-store ~/prefixes
      trt-kv generate engines/llama3-freekv --prompt-file long.txt --host-tier file:/var/tmp/kv --trace trace.json
      trt-kv generate engines/llama3-prefixkv --prompt-file long.txt --device cuda --dtype bfloat16
      trt-kv generate ENGINE --prompt-file prompt.txt --temperature 0.8 --top-p 0.95 --seed 7 --stop "."
      trt-kv generate ENGINE --prompt-file prompt.txt --repetition-penalty 1.1
      trt-kv generate ENGINE --prompt-file prompt.txt --temperature 0.8 --n 3
      trt-kv generate ENGINE --chat "What is the capital of France?" --system "Answer in one word."
      trt-kv generate ENGINE --chat "Name a city and its country." --json-schema schema.json
    """
    if not is_message and (system is not None or of_template):
        raise UsageError("a chat template's options are given without --chat", fix="add --chat")
    chat = ChatChoice(system=system, of_template=of_template) if is_message else None
    text = read_prompt(prompt, prompt_file)
    sampling |= {"parse_special_tokens": parse_special_tokens}
    notes: list[str] = []
    running = RunOptions(on=on, digest=digest, resources=resources.for_one_prompt(), trace=trace, model_defaults=model_defaults)
    begun = False
    try:
        for piece in stream_text(
            engine=engine, prompt=text, sampling=sampling, running=running, on_end=notes.append, chat=chat
        ):
            begun = True
            click.echo(piece, nl=False)
    finally:
        if begun:  # an error is told on a line of its own
            click.echo()
    for note in notes:
        say(note, err=True)
