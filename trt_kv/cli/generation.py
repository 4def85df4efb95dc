"""Streaming of generated text, followed by lines of statistics."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_kv.cli.generation_notes import held_note, recall_note
from trt_kv.cli.progress import progress_bars
from trt_kv.pipeline.callbacks import OnProgress
from trt_kv.pipeline.destinations import check_new_file
from trt_kv.pipeline.plans import DeviceChoice, ResourceChoice

if TYPE_CHECKING:
    from trt_kv.runtime.engine import Engine
    from trt_kv.runtime.stream import Stream


@dataclass(frozen=True, kw_only=True)
class ChatChoice:
    """That a prompt is the message of a user, after the message ``system``; ``of_template``: options of ``Engine.chat``."""

    system: str | None = None
    of_template: dict[str, Any] = field(default_factory=dict)

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The conversation that the prompt begins."""
        before = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*before, {"role": "user", "content": prompt}]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How an engine is run, and where (``on``). ``digest``: of the only engine to accept. ``trace``: the file that the
    timeline is written to.
    """

    on: DeviceChoice = field(default_factory=DeviceChoice)
    digest: str | None = None
    resources: ResourceChoice = field(default_factory=ResourceChoice)
    trace: Path | None = None

    def __post_init__(self) -> None:
        if self.trace is not None:
            check_new_file(self.trace, "--trace", in_place=True)


def stream_text(
    *,
    engine: Path,
    prompt: str,
    sampling: dict[str, Any],
    running: RunOptions,
    on_end: Callable[[str], None],
    chat: ChatChoice | None = None,
) -> Iterator[str]:
    """Chunks of generated text; afterwards ``on_end`` is called with each line of statistics. ``sampling``: the fields of
    ``SamplingParams``. ``chat``: the prompt is the message of a user, not a text to continue.
    """
    from trt_kv.runtime.engine import Engine
    from trt_kv.runtime.trace import NO_TRACE, Trace

    trace = NO_TRACE if running.trace is None else Trace()
    with progress_bars() as on_progress:
        options_of_load = {**running.on.options, **running.resources.options()}
        loaded = Engine.load(engine, digest=running.digest, trace=trace, on_progress=on_progress, **options_of_load)
        n_prompt, stream = _started(loaded, prompt, sampling, chat, on_progress)
        first = next(stream, "")
    yield first
    yield from stream
    result = stream.result
    if chat is None and sampling["parse_special_tokens"] and n_prompt < len(loaded.tokenizer.encode(prompt).ids):
        on_end("[the prompt begins with the tokenizer's BOS: no second one was put in front]")
    on_end(held_note(loaded.manifest, result))
    if not running.on.on_host:
        on_end(f"[run by {loaded.runner.description}]")
    counts = None if loaded.runner.tiers is None else loaded.runner.tiers.statistics
    if counts is not None:
        on_end(recall_note(loaded.manifest, result, counts))
    loaded.close()
    if running.trace is not None:
        trace.save(running.trace)
        on_end(f"[trace: {running.trace}, for chrome://tracing or ui.perfetto.dev]")


def _started(
    engine: "Engine", prompt: str, sampling: dict[str, Any], chat: ChatChoice | None, on_progress: OnProgress
) -> tuple[int, "Stream"]:
    """The prompt's length in tokens and the stream of its continuation, or of the answer to it."""

    def on_prefill(done: int) -> None:
        on_progress("reading the prompt", done, n_prompt)

    if chat is not None:
        ids, params = engine.chat_request(chat.messages(prompt), None, **sampling, **chat.of_template)
        n_prompt = len(ids)
        return n_prompt, engine.stream(ids, params, on_prefill=on_prefill)
    n_prompt = len(engine.encode(prompt, parse_special_tokens=sampling["parse_special_tokens"]))
    return n_prompt, engine.stream(prompt, on_prefill=on_prefill, **sampling)
