"""``trt-kv chat``: a conversation with an engine in the terminal, or line by line."""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_kv.cli.chat_options import chat_options
from trt_kv.cli.chat_session import HELP, Session, StopChat
from trt_kv.cli.options import any_path, debug_option, digest_option
from trt_kv.cli.output import say
from trt_kv.cli.progress import progress_bars
from trt_kv.cli.run_options import device_options, resource_options
from trt_kv.cli.sampling_notes import defaults_notes
from trt_kv.cli.sampling_options import answer_options, model_defaults_option
from trt_kv.cli.signals import interrupts_noted
from trt_kv.errors import TrtKvError, UsageError
from trt_kv.pipeline.chat import Conversation
from trt_kv.pipeline.plans import DeviceChoice, ResourceChoice
from trt_kv.text_file import check_encodable, text_from_bytes

if TYPE_CHECKING:
    from trt_kv.runtime.session import Mode

PROMPT = "> "
MAX_NEW_TOKENS = 1024
"""Default of --max-new-tokens: answers end by themselves."""


@click.command("chat", short_help="Talk with an engine of an instruct model.")
@click.argument("engine", type=any_path)
@chat_options
@click.option(
    "--mode",
    type=click.Choice(("exact", "compressed")),
    default="exact",
    show_default=True,
    help="exact: each answer is that to the whole conversation. compressed: it goes on from what the policy kept.",
)
@click.option(
    "--session",
    "file",
    type=any_path,
    metavar="FILE",
    help="Continue the conversation in FILE, if there is one, and write it there after each answer.",
)
@answer_options(max_new_tokens=MAX_NEW_TOKENS)
@model_defaults_option
@resource_options
@device_options
@digest_option
@debug_option
def command(
    *,
    engine: Path,
    system: str | None,
    of_template: dict[str, Any],
    mode: "Mode",
    file: Path | None,
    sampling: dict[str, Any],
    model_defaults: bool,
    resources: ResourceChoice,
    on: DeviceChoice,
    digest: str | None,
) -> None:
    """Talk with ENGINE. Each line is a message, and its answer is streamed. In mode exact the whole conversation is sent with
    each, of which the prefix cache has most. In mode compressed what the policy dropped is lost for later answers.

    In a terminal, Ctrl-C stops an answer, and leaves at the prompt, as Ctrl-D does. /help lists commands such as /reset and
    /policy. If standard input is not a terminal, each of its lines is a message. Answers have at most 1024 tokens by default.

    \b
    Examples:
      trt-kv chat engines/smollm2-prefixkv
      trt-kv chat engines/smollm2-prefixkv --system "You answer in one sentence." --temperature 0.7
      trt-kv chat engines/smollm2-prefixkv --mode compressed --session talk
      trt-kv chat engines/qwen3-full --variable enable_thinking=false < questions.txt
    """
    from trt_kv.runtime.engine import Engine

    sampling = {"max_new_tokens": MAX_NEW_TOKENS} | sampling
    with progress_bars() as on_progress:
        options_of_load = {**on.options, **resources.options(), "model_defaults": model_defaults}
        loaded = Engine.load(engine, digest=digest, on_progress=on_progress, **options_of_load)
    for note in defaults_notes(loaded.model_defaults, replace(loaded.default_sampling, **sampling), given=list(sampling)):
        say(note, err=True)
    with loaded:
        conversation = Conversation(loaded, system=system, sampling=sampling, of_template=of_template, mode=mode, file=file)
        session = Session(conversation, write=lambda text: click.echo(text, nl=False), say=lambda text: say(text, err=True))
        if _is_terminal():
            _talk(session)
        else:
            with contextlib.suppress(StopChat):
                for line in _lines():
                    session.take(line)


def _talk(session: Session) -> None:
    """Messages from a terminal, until the user leaves. Errors are told, and the conversation goes on."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (lets input() edit lines)
    say(f"{HELP.splitlines()[0]}; Ctrl-C stops an answer, Ctrl-D leaves", err=True)
    while True:
        try:
            line = input(PROMPT)
        except (EOFError, KeyboardInterrupt):
            click.echo()
            return
        try:
            check_encodable(line, what="the message")
            with interrupts_noted() as interrupts:
                session.take(line, check=interrupts.check)
        except StopChat:
            return
        except KeyboardInterrupt:
            click.echo()
            say("[stopped]", err=True)
        except TrtKvError as error:
            say(f"error: {error}", err=True)


def _lines() -> Iterator[str]:
    """The lines of standard input that are not empty."""
    if sys.stdin is None:
        raise UsageError("there are no messages", got="a closed standard input", fix="run it in a terminal, or with < FILE")
    for number, line in enumerate(sys.stdin.buffer, start=1):
        text = text_from_bytes(line, what="a message", where=f"standard input (line {number})").rstrip("\n")
        if text.strip():
            yield text


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()
