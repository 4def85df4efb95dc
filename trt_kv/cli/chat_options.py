"""Options of the commands that render a chat template."""

import functools
import json
from typing import Any

import click

from trt_kv.cli.options import CommandFunction, utf8_text
from trt_kv.errors import UsageError


def chat_options(command: CommandFunction) -> CommandFunction:
    """Add --system, --template and --variable; ``command`` receives ``system`` and, for ``Engine.chat``, ``of_template``."""

    @click.option(
        "--system", callback=utf8_text, metavar="TEXT", help="System message. Default: none, or what the template has for it."
    )
    @click.option("--template", metavar="NAME", help="Which of several chat templates. Default: default.")
    @click.option(
        "--variable",
        "variables",
        callback=utf8_text,
        multiple=True,
        metavar="NAME=VALUE",
        help="Set a variable of the chat template, e.g. enable_thinking=false; may be given several times.",
    )
    @functools.wraps(command)
    def collected(*, template: str | None, variables: tuple[str, ...], **values: Any) -> None:
        given = {"template": template, "template_variables": dict(map(_variable, variables)) or None}
        command(of_template={name: value for name, value in given.items() if value is not None}, **values)

    return collected


def _variable(text: str) -> tuple[str, Any]:
    """Name and value of ``NAME=VALUE``; what is not JSON is a text."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise UsageError("a variable of a template is NAME=VALUE", got=repr(text), expected="e.g. enable_thinking=false")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value
