"""Options that say how tokens are chosen and when an answer ends."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from trt_kv.cli.options import CommandFunction, existing_file, utf8_text
from trt_kv.errors import UsageError
from trt_kv.text_file import read_text


def sampling_options(command: CommandFunction) -> CommandFunction:
    """Add the options of ``SamplingParams``; ``command`` receives ``sampling``, the keyword arguments that were given, which
    the runtime checks.
    """

    @click.option(
        "--n", type=int, metavar="N", help="Generate N samples of one prompt, with seeds counted up from --seed. Default: 1."
    )
    @click.option(
        "--logprobs",
        "top_logprobs",
        type=int,
        metavar="N",
        help="After the text, print the log-probability of each token and the N likeliest in its place.",
    )
    @click.option(
        "--json-schema",
        type=existing_file,
        metavar="FILE",
        help="The text is JSON of the schema in FILE. Needs the extra structured.",
    )
    @click.option("--regex", callback=utf8_text, metavar="TEXT", help="The text matches this regular expression, as a whole.")
    @click.option(
        "--grammar", type=existing_file, metavar="FILE", help="The text is of the grammar in FILE, in Lark's notation."
    )
    @functools.wraps(command)
    def collected(
        *,
        n: int | None,
        top_logprobs: int | None,
        json_schema: Path | None,
        regex: str | None,
        grammar: Path | None,
        sampling: dict[str, Any],
        **values: Any,
    ) -> None:
        more = {
            "n": n,
            "top_logprobs": top_logprobs,
            "json_schema": json_schema and read_text(json_schema, what="the JSON schema"),
            "regex": regex,
            "grammar": grammar and read_text(grammar, what="the grammar"),
        }
        command(sampling=sampling | {name: value for name, value in more.items() if value is not None}, **values)

    return answer_options()(collected)


def answer_options(*, max_new_tokens: int = 128) -> Callable[[CommandFunction], CommandFunction]:
    """The options of ``sampling_options`` that concern one answer. ``max_new_tokens``: the default that the help names."""
    return functools.partial(_with_answer_options, max_new_tokens=max_new_tokens)


def _with_answer_options(command: CommandFunction, max_new_tokens: int) -> CommandFunction:
    def number(name: str, metavar: str, text: str, default: float) -> Callable[[CommandFunction], CommandFunction]:
        whose = "the model's, else " if name.lstrip("-").replace("-", "_") in _OF_MODELS else ""
        return click.option(name, type=type(default), metavar=metavar, help=f"{text} Default: {whose}{default:g}.")

    @number("--max-new-tokens", "N", "Stop after N tokens.", max_new_tokens)
    @number("--min-tokens", "N", "Do not stop before N tokens.", 0)
    @number("--temperature", "T", "Sampling temperature; 0: greedy.", 0.0)
    @number("--top-k", "K", "Sample from the K likeliest tokens; 0: all.", 0)
    @number("--top-p", "P", "Sample from the likeliest tokens of total mass P.", 1.0)
    @number("--min-p", "P", "Sample from tokens with at least P times the highest probability.", 0.0)
    @number("--typical-p", "P", "Sample from the most typical tokens of total mass P.", 1.0)
    @number("--repetition-penalty", "X", "Divide the logits of tokens seen before by X; 1: none.", 1.0)
    @number("--presence-penalty", "X", "Subtract X from the logits of generated tokens.", 0.0)
    @number("--frequency-penalty", "X", "Subtract X for each time that a token was generated.", 0.0)
    @click.option(
        "--logit-bias",
        "biases",
        multiple=True,
        metavar="ID=X",
        help="Add X to the logit of a token id; may be given several times.",
    )
    @click.option(
        "--bad-word",
        "bad_words",
        callback=utf8_text,
        multiple=True,
        metavar="TEXT",
        help="Never generate this text; may be given several times.",
    )
    @click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Sampling seed.")
    @click.option(
        "--stop", callback=utf8_text, multiple=True, metavar="TEXT", help="Stop before this text; may be given several times."
    )
    @click.option(
        "--stop-token-id",
        "stop_token_ids",
        type=int,
        multiple=True,
        metavar="ID",
        help="Stop before this token; may be given several times.",
    )
    @click.option("--ignore-eos", is_flag=True, help="Do not stop at the model's end of text.")
    @click.option(
        "--skip-special-tokens/--show-special-tokens",
        default=True,
        show_default=True,
        help="Whether special tokens that are generated have no text.",
    )
    @functools.wraps(command)
    def collected(*, biases: tuple[str, ...], **values: Any) -> None:
        sampling = {name: values.pop(name) for name in _NAMES} | {"logit_bias": dict(map(_bias, biases))}
        given = {name: value for name, value in sampling.items() if value is not None and value not in ((), {})}
        command(sampling=given, **values)

    return collected


model_defaults_option = click.option(
    "--model-defaults/--no-model-defaults",
    default=True,
    show_default=True,
    help="Whether sampling options that are not given are those of the model's generation_config.json.",
)

_OF_MODELS = ("temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty")
_NAMES = (
    *("max_new_tokens", "min_tokens", *_OF_MODELS, "presence_penalty", "frequency_penalty", "bad_words", "seed", "stop"),
    *("stop_token_ids", "ignore_eos", "skip_special_tokens"),
)


def _bias(text: str) -> tuple[int, float]:
    """Token id and bias of ``ID=X``."""
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError as error:
        raise UsageError("a logit bias is ID=X", got=repr(text), expected="a token id and a number, e.g. 198=-5") from error
