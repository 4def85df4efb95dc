"""Options that several commands share; each decorator turns its options into one checked object."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from trt_kv.errors import UsageError
from trt_kv.manifest import KV_DTYPES
from trt_kv.pipeline.plans import (
    DEFAULT_CORRECTION_RATE,
    DEFAULT_NEW_TOKENS,
    DEFAULT_PAGE_SIZE,
    TARGETS,
    CalibrationPlan,
    DriftPlan,
    ModelSource,
    TargetPlan,
)
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.policy import Policy
from trt_kv.policy_settings import policy_with, settings_from_text
from trt_kv.presets import PRESETS
from trt_kv.scores import score_names, scores_that_read
from trt_kv.text_file import check_encodable

CommandFunction = Callable[..., None]

existing_file = click.Path(exists=True, dir_okay=False, readable=True, path_type=Path)
any_path = click.Path(path_type=Path)


Texts = TypeVar("Texts", str | None, tuple[str, ...])


def utf8_text(_ctx: click.Context, parameter: click.Parameter, value: Texts) -> Texts:
    """Callback of a text, or several, that the model is to read or write: bytes that are not UTF-8 are a ``UsageError``."""
    name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
    for text in (value,) if isinstance(value, str) else value or ():
        check_encodable(text, what=name)
    return value


@dataclass
class Invocation:
    """State of one run of ``trt-kv`` that outlives click's contexts."""

    debug: bool = False


def _remember_debug(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value and isinstance(ctx.obj, Invocation):
        ctx.obj.debug = True


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_remember_debug, help="Show the traceback when something fails."
)


def model_options(command: CommandFunction) -> CommandFunction:
    """Add --model, --checkpoint and --context; ``command`` receives ``source``, a ``ModelSource``."""

    @click.option(
        "--model",
        default="llama3",
        show_default=True,
        metavar="NAME",
        help=f"Model preset: one of {', '.join(PRESETS)}; see trt-kv models.",
    )
    @click.option(
        "--checkpoint",
        metavar="PATH|ID",
        help="Any other checkpoint, instead of --model: a folder in Hugging Face layout, a .gguf file, or a hub id "
        "OWNER/NAME[@REVISION][:FILE.gguf].",
    )
    @click.option(
        "--context",
        type=int,
        metavar="POSITIONS",
        help="Longest text, in tokens. Default, and most: the model's own. A RoPE with factors for short and long contexts "
        "takes those of this one.",
    )
    @functools.wraps(command)
    def collected(*, model: str, checkpoint: str | None, context: int | None, **others: Any) -> None:
        command(source=ModelSource(model=model, checkpoint=checkpoint or None, context=context), **others)

    return collected


def policy_options(command: CommandFunction) -> CommandFunction:
    """Add --policy, --set and the short forms --budget, --score, --window; ``command`` receives ``policy``, a ``Policy``."""

    @click.option(
        "--policy",
        default="prefixkv",
        show_default=True,
        metavar="NAME",
        help=f"Which tokens each layer keeps: one of {', '.join(policy_names())}.",
    )
    @click.option(
        "--budget",
        type=float,
        metavar="SHARE",
        help="Kept share of the cache, mean over layers, in (0, 1]. Default: the policy's.",
    )
    @click.option(
        "--score", metavar="NAME", help=f"How tokens are ranked: one of {', '.join(score_names())}. Default: the policy's."
    )
    @click.option(
        "--window",
        type=int,
        metavar="QUERIES",
        help=f"Number of last prompt queries that are scored; with --score {', '.join(scores_that_read('window'))}. "
        "Default: the policy's.",
    )
    @click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="PART=VALUE...",
        help="Replace parts of the policy, e.g. --set score=window budget=unimetric. `trt-kv policies` lists them.",
    )
    @click.argument("more", nargs=-1, metavar="")
    @functools.wraps(command)
    def collected(
        *,
        policy: str,
        budget: float | None,
        score: str | None,
        window: int | None,
        assignments: tuple[str, ...],
        more: tuple[str, ...],
        **others: Any,
    ) -> None:
        if more and not assignments:
            raise UsageError("this command takes options only", got=" ".join(more), fix="did you mean --set PART=VALUE?")
        short = {"kept": budget, "score": score, "window": window}
        settings = {name: value for name, value in short.items() if value is not None}
        command(policy=_policy_from_options(policy, settings, settings_from_text(assignments + more)), **others)

    return collected


def _policy_from_options(name: str, short: Mapping[str, Any], settings: Mapping[str, Any]) -> Policy:
    """The preset ``name`` with parts replaced; raises ``UsageError`` for an invalid combination."""
    twice = sorted(set(short) & set(settings))
    if twice:
        raise UsageError(f"{twice[0]} is given twice", got=f"{short[twice[0]]} and {settings[twice[0]]}", fix="give it once")
    return policy_with(policy_from_name(name), {**short, **settings})


page_size_option = click.option(
    "--page-size",
    type=int,
    default=DEFAULT_PAGE_SIZE,
    show_default=True,
    metavar="TOKENS",
    help="Tokens per page of the KV cache. Policies such as freekv recall whole pages.",
)


def target_options(command: CommandFunction) -> CommandFunction:
    """Add --target and the options of TensorRT; ``command`` receives ``target``, a ``TargetPlan``."""

    @click.option(
        "--target",
        default="onnxruntime",
        show_default=True,
        metavar="NAME",
        help=f"What runs the engine: {', '.join(TARGETS)}.",
    )
    @click.option(
        "--profile",
        metavar="NAME|FILE",
        help="Sizes to compile for, with --target tensorrt: edge, datacenter, or a .json file of this format. Default: edge.",
    )
    @click.option("--dtype", metavar="NAME", help="Compute type: float32 (the default); float16 or bfloat16, for GPUs.")
    @click.option(
        "--kv-dtype",
        metavar="NAME",
        help=f"Type in which the KV cache is stored on a CPU: one of {', '.join(KV_DTYPES)}. Default: float32.",
    )
    @click.option(
        "--timing-cache", type=any_path, metavar="FILE", help="TensorRT timing cache, read if it exists, then updated."
    )
    @page_size_option
    @functools.wraps(command)
    def collected(
        *,
        target: str,
        profile: str | None,
        dtype: str | None,
        kv_dtype: str | None,
        timing_cache: Path | None,
        page_size: int,
        **others: Any,
    ) -> None:
        plan = TargetPlan(
            target=target,
            profile=profile,
            dtype=dtype,
            kv_dtype=kv_dtype,
            timing_cache=timing_cache,
            page_size=page_size,
        )
        command(target=plan, **others)

    return collected


def calibration_options(command: CommandFunction) -> CommandFunction:
    """Add --prompts, --samples and --seed; ``command`` receives ``calibration``, a ``CalibrationPlan``."""

    @click.option(
        "--prompts",
        type=existing_file,
        metavar="FILE",
        help='Calibration prompts: .txt with one per line, or .jsonl with {"prompt": ...} or {"messages": [...]}. '
        "Default: trt-kv's synthetic English.",
    )
    @click.option("--samples", type=int, default=10, show_default=True, metavar="N", help="Number of calibration prompts.")
    @click.option("--seed", type=int, default=0, show_default=True, metavar="N", help="Seed for drawing the prompts.")
    @functools.wraps(command)
    def collected(*, prompts: Path | None, samples: int, seed: int, **others: Any) -> None:
        command(calibration=CalibrationPlan(prompts=prompts, samples=samples, seed=seed), **others)

    return collected


def drift_options(*, with_file: bool) -> Callable[[CommandFunction], CommandFunction]:
    """Add --correction-rate, --new-tokens and, ``with_file``, --drift, else --page-size; ``command`` receives ``drift``, a
    ``DriftPlan``.
    """

    def decorate(command: CommandFunction) -> CommandFunction:
        @click.option(
            "--correction-rate",
            type=float,
            metavar="SHARE",
            help="Share of each layer's KV heads that select their pages again in a step; with drift=calibrated. "
            f"Default: {DEFAULT_CORRECTION_RATE}.",
        )
        @click.option(
            "--new-tokens",
            type=int,
            metavar="N",
            help=f"Tokens generated after each calibration prompt to measure drift. Default: {DEFAULT_NEW_TOKENS}.",
        )
        @functools.wraps(command)
        def collected(
            *, correction_rate: float | None, new_tokens: int | None, drift: Path | None = None, **others: Any
        ) -> None:
            size = DEFAULT_PAGE_SIZE if with_file else others.pop("page_size")
            command(drift=DriftPlan(file=drift, rate=correction_rate, tokens=new_tokens, page_size=size), **others)

        return drift_file_option(collected) if with_file else page_size_option(collected)

    return decorate


drift_file_option = click.option(
    "--drift",
    type=existing_file,
    metavar="FILE",
    help="Drift thresholds per layer to use instead of measuring them, for a policy with drift=calibrated.",
)

digest_option = click.option(
    "--digest",
    metavar="sha256:...",
    help="Refuse any engine but the one with this digest, which `trt-kv inspect` shows. Default: any.",
)
