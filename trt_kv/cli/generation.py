"""Streaming of generated text, followed by lines of statistics."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trt_kv.cli.generation_notes import held_notes, prefix_note, recall_note
from trt_kv.cli.progress import progress_bars
from trt_kv.cli.sampling_notes import defaults_notes, logprobs_text, samples_text
from trt_kv.pipeline.destinations import check_new_file
from trt_kv.pipeline.plans import DeviceChoice, ResourceChoice

if TYPE_CHECKING:
    from trt_kv.runtime.engine import Engine
    from trt_kv.runtime.generation import Generation
    from trt_kv.runtime.sampling import SamplingParams
    from trt_kv.runtime.text.prompts import Prompt


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
    timeline is written to. ``model_defaults``: see ``Engine.load``.
    """

    on: DeviceChoice = field(default_factory=DeviceChoice)
    digest: str | None = None
    resources: ResourceChoice = field(default_factory=ResourceChoice)
    trace: Path | None = None
    model_defaults: bool = True

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
    """Chunks of generated text, of several samples one after the other; afterwards ``on_end`` is called with each line of
    statistics. ``sampling``: the fields of ``SamplingParams`` in place of the model's. ``chat``: the prompt is the
    message of a user, not a text to continue.
    """
    from trt_kv.runtime.engine import Engine
    from trt_kv.runtime.trace import NO_TRACE, Trace

    trace = NO_TRACE if running.trace is None else Trace()
    with progress_bars() as on_progress:
        options_of_load = {**running.on.options, **running.resources.options()}
        options_of_load |= {"model_defaults": running.model_defaults}
        loaded = Engine.load(engine, digest=running.digest, trace=trace, on_progress=on_progress, **options_of_load)
        request, params, n_prompt = _request(loaded, prompt, sampling, chat)
        pieces, result_of = _answer(loaded, request, params, lambda done: on_progress("reading the prompt", done, n_prompt))
        first = next(pieces, "")
    yield first
    yield from pieces
    result = result_of()
    if params.top_logprobs is not None:
        yield logprobs_text(result, loaded.tokenizer)
    for note in defaults_notes(loaded.model_defaults, params, given=list(sampling)):
        on_end(note)
    if chat is None and sampling["parse_special_tokens"] and n_prompt < len(loaded.tokenizer.encode(prompt).ids):
        on_end("[the prompt begins with the tokenizer's BOS: no second one was put in front]")
    for note in held_notes(loaded.manifest, result):
        on_end(note)
    if result.n_cached_tokens or running.resources.prefix_store is not None:
        on_end(prefix_note(result))
    if not running.on.on_host:
        on_end(f"[run by {loaded.runner.description}]")
    counts = None if loaded.runner.tiers is None else loaded.runner.tiers.statistics
    if counts is not None:
        on_end(recall_note(loaded.manifest, result, counts))
    loaded.close()
    if running.trace is not None:
        trace.save(running.trace)
        on_end(f"[trace: {running.trace}, for chrome://tracing or ui.perfetto.dev]")


def _request(
    engine: "Engine", prompt: str, sampling: dict[str, Any], chat: ChatChoice | None
) -> "tuple[Prompt, SamplingParams, int]":
    """What is asked of the engine, with which parameters, and its length in tokens."""
    if chat is not None:
        ids, params = engine.chat_request(chat.messages(prompt), None, **sampling, **chat.of_template)
        return ids, params, len(ids)
    n_prompt = len(engine.encode(prompt, parse_special_tokens=sampling["parse_special_tokens"]))
    return prompt, replace(engine.default_sampling, **sampling), n_prompt


def _answer(
    engine: "Engine", prompt: "Prompt", params: "SamplingParams", on_prefill: Callable[[int], None]
) -> tuple[Iterator[str], Callable[[], "Generation"]]:
    """The text of a prompt's continuation, as it comes, or of several samples at once; and what returns the result."""
    if params.n > 1:
        samples = engine.generate(prompt, params)
        return iter([samples_text(samples)]), lambda: samples
    stream = engine.stream(prompt, params, on_prefill=on_prefill)
    return stream, lambda: stream.result
