"""``trt-kv serve``: an engine behind OpenAI's HTTP interface."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from trt_kv.cli.options import any_path, debug_option, digest_option
from trt_kv.cli.output import say
from trt_kv.cli.progress import progress_bars
from trt_kv.cli.run_options import byte_count, device_options, resource_options
from trt_kv.cli.sampling_options import model_defaults_option
from trt_kv.cli.signals import termination_unwinds
from trt_kv.pipeline.destinations import check_new_file
from trt_kv.pipeline.plans import DeviceChoice, ResourceChoice
from trt_kv.require import require

if TYPE_CHECKING:
    from trt_kv.runtime.engine import Engine

N_TRACED = 500_000
"""Spans of a timeline, the last ones: a server may run for months."""


@click.command("serve", short_help="Serve an engine over HTTP, as OpenAI's API.")
@click.argument("engine", type=any_path)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Listen there; 0.0.0.0: everywhere.")
@click.option("--port", type=int, default=8000, show_default=True, metavar="N", help="Listen there; 0: a free port.")
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar="TRT_KV_API_KEY",
    metavar="KEY",
    help="What clients must send; may be given several times. Default: those in $TRT_KV_API_KEY, else nothing.",
)
@click.option("--model-name", metavar="NAME", help="What clients call the model. Default: the engine's folder.")
@click.option("--max-queue", type=int, metavar="N", help="Requests that may wait; others are refused (503). Default: 256.")
@click.option("--max-sequences", type=click.IntRange(min=1), metavar="N", help="Sequences that run at once. Default: 256.")
@click.option("--max-prompt-tokens", type=click.IntRange(min=1), metavar="N", help="Longest prompt. Default: the engine's.")
@click.option("--max-body-bytes", type=int, metavar="N", help="Largest request. Default: 4 MiB.")
@click.option("--max-new-tokens", type=int, metavar="N", help="Limit of chat answers that give none. Default: 1024.")
@click.option(
    "--drain-seconds", type=int, metavar="S", help="After Ctrl-C or SIGTERM, requests may go on for so long. Default: 30."
)
@click.option("--max-sessions", type=int, metavar="N", help="Conversations that are remembered for clients. Default: 256.")
@click.option(
    "--session-bytes", callback=byte_count, metavar="SIZE", help="Memory of what they have kept, e.g. 2GiB. Default: 1 GiB."
)
@click.option(
    "--session-seconds", type=int, metavar="S", help="They are forgotten after so long without a turn. Default: 3600."
)
@click.option("--log-prompts", is_flag=True, help="Show prompts and answers in the log, which is JSON lines on standard error.")
@click.option(
    "--trace", type=any_path, metavar="FILE", help="At the end, write a timeline, as JSON for chrome://tracing or Perfetto."
)
@model_defaults_option
@resource_options
@device_options
@digest_option
@debug_option
def command(
    *,
    engine: Path,
    model_name: str | None,
    max_sequences: int | None,
    trace: Path | None,
    model_defaults: bool,
    resources: ResourceChoice,
    on: DeviceChoice,
    digest: str | None,
    **settings: Any,
) -> None:
    """Serve ENGINE at http://HOST:PORT/v1 for OpenAI's clients, with a chat page at /, and Prometheus' metrics at /metrics.

    Ctrl-C or SIGTERM stops it: requests that run may end within --drain-seconds; a second Ctrl-C ends them at once.

    \b
    Examples:
      trt-kv serve engines/smollm2-prefixkv
      trt-kv serve engines/smollm2-prefixkv --host 0.0.0.0 --port 8080 --model-name smollm2 --max-queue 64
      trt-kv serve engines/llama3-freekv --host-tier file:/var/tmp/kv --cache-tokens 65536
    """
    require("uvicorn", extra="serve")
    from trt_kv.runtime.async_engine import AsyncEngine
    from trt_kv.runtime.trace import NO_TRACE, Trace
    from trt_kv.serving.http.server import HttpServer
    from trt_kv.serving.http.settings import ServerSettings
    from trt_kv.serving.logs import log_event, log_to

    given = {name: value for name, value in settings.items() if value is not None}
    of_server = ServerSettings(model_name=model_name or engine.resolve().name, **given)
    if trace is not None:
        check_new_file(trace, "--trace", in_place=True)
    timeline = NO_TRACE if trace is None else Trace(n_last=N_TRACED)
    options: dict[str, Any] = {**on.options, **resources.options(), "model_defaults": model_defaults}
    with termination_unwinds():
        loaded = _load(engine, digest=digest, trace=timeline, max_sequences=max_sequences, **options)
        try:
            server = HttpServer(AsyncEngine(loaded), of_server)
            log_to(sys.stderr)
            say(f"{of_server.model_name} at {server.url}/v1, chat page at {server.url}", err=True)
            if of_server.is_open:
                say("[anybody who reaches this address can use the model: --api-key asks for a key]", err=True)
            log_event("started", url=server.url, model=of_server.model_name, process=os.getpid())
            server.run_until_stopped()
        finally:
            loaded.close()
    if trace is not None:
        timeline.save(trace)
        say(f"[trace: {trace}, for chrome://tracing or ui.perfetto.dev]", err=True)


def _load(engine: Path, **options: Any) -> "Engine":
    """The engine, after first tokens."""
    from trt_kv.runtime.engine import Engine
    from trt_kv.serving.first_tokens import generate_first_tokens

    with progress_bars() as on_progress:
        loaded = Engine.load(engine, on_progress=on_progress, **options)
        on_progress("first token", 0, 1)
        generate_first_tokens(loaded)
        on_progress("first token", 1, 1)
    return loaded
