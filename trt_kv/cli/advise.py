"""``trt-kv advise``: what fits into this machine's memory under each policy, and how long it takes."""

import json
from pathlib import Path

import click

from trt_kv.cli.advice_table import print_advice
from trt_kv.cli.options import any_path, debug_option, existing_file
from trt_kv.cli.progress import progress_bars, say_note
from trt_kv.cli.signals import termination_unwinds
from trt_kv.cli.sizes import byte_count, token_count
from trt_kv.manifest import KV_DTYPES
from trt_kv.pipeline import AdviceRequest, advise
from trt_kv.pipeline.advise import DEFAULT_NEW_TOKENS
from trt_kv.pipeline.plans import QUANTS


@click.command("advise", short_help="Plan memory and time: which policy and context fit this machine.")
@click.argument("model")
@click.option(
    "--context",
    type=token_count,
    metavar="TOKENS",
    help="Prompt and answer together, e.g. 32k. Default: the model's positions.",
)
@click.option(
    "--new-tokens", type=token_count, default=DEFAULT_NEW_TOKENS, show_default=True, metavar="N", help="Of these, the answer."
)
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Requests at once.")
@click.option("--memory", type=byte_count, metavar="SIZE", help="Memory to plan with, e.g. 16GiB. Default: what is free now.")
@click.option("--quant", metavar="NAME", help=f"Weights of a checkpoint: one of {', '.join(QUANTS)}. Default: none.")
@click.option(
    "--kv-dtype",
    metavar="NAME",
    help=f"Type of the KV cache: one of {', '.join(KV_DTYPES)}. Default: float32, or the engine's.",
)
@click.option("--page-size", type=int, metavar="TOKENS", help="Tokens per page of the KV cache. Default: 32, or the engine's.")
@click.option("--policy", "policies", multiple=True, metavar="NAME", help="Only this policy; may be repeated. Default: all.")
@click.option("--measure/--no-measure", default=True, help="Probe this machine for times, or plan sizes alone.")
@click.option(
    "--tasks", type=existing_file, metavar="FILE", help="Also answer tasks (JSON lines) under each policy, and recommend one."
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Use the first N tasks only.")
@click.option(
    "--out",
    type=any_path,
    default="advice",
    show_default=True,
    metavar="FOLDER",
    help="With --tasks: engines, answers, picture.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@debug_option
def command(
    *,
    model: str,
    context: int | None,
    new_tokens: int,
    batch: int,
    memory: int | None,
    quant: str | None,
    kv_dtype: str | None,
    page_size: int | None,
    policies: tuple[str, ...],
    measure: bool,
    tasks: Path | None,
    limit: int | None,
    out: Path,
    as_json: bool,
) -> None:
    """Plan for MODEL: the name of a preset, a checkpoint (folder, .gguf file or hub id), or an engine folder.

    For each policy: memory of weights and caches by the arithmetic with which requests are admitted, whether it fits, the
    longest context and the most requests that do, and the time of a token and of a prompt. Times come from a probe of this
    machine, and of an engine some of its steps are timed, too: give one for times that include its dense layers. How well a
    policy answers is not known without tasks: with --tasks, which has lines as for `trt-kv evaluate`, engines with six
    policies, or those of --policy, are built and answer them, and accuracy is compared with bytes and time.

    \b
    Examples:
      trt-kv advise smollm2 --context 8k --batch 8
      trt-kv advise ~/models/Llama-3.1-8B --quant int4 --context 32k --memory 16GiB
      trt-kv advise engines/smollm2-prefixkv-int4 --json
      trt-kv advise smollm2 --quant int4 --tasks mine.jsonl --policy full --policy snapkv --policy freekv
    """
    request = AdviceRequest(
        model=model,
        context=context,
        new_tokens=new_tokens,
        batch=batch,
        memory_bytes=memory,
        quant=quant,
        kv_dtype=kv_dtype,
        page_size=page_size,
        policies=policies,
        measure=measure,
        tasks=tasks,
        limit=limit,
        out=out,
    )
    with termination_unwinds(), progress_bars() as on_progress:
        advice = advise(request, on_progress=on_progress, on_note=say_note)
    if as_json:
        click.echo(json.dumps(advice.to_json(), indent=1))
    else:
        print_advice(advice)
