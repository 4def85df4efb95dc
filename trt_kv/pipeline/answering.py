"""An engine answers tasks: greedily, and along the expected answer.

Each prompt is read once. Of the sequence it leaves, as evicted from as the policy has it, one copy goes on with the engine's
own tokens and a second one with the expected tokens. B sequences of a step, V vocabulary.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from trt_kv.calibration.task_files import Match, is_right
from trt_kv.errors import CapacityError, EngineError

if TYPE_CHECKING:
    from trt_kv.calibration.answers import Answer
    from trt_kv.calibration.task_cases import TaskCase
    from trt_kv.plugins.paging import Floats
    from trt_kv.runtime.cache.sequence import SequenceCache
    from trt_kv.runtime.engine import Engine
    from trt_kv.runtime.request import Request


def answers_to(
    engine: "Engine", cases: Sequence["TaskCase"], *, match: Match, batch_size: int, on_tokens: Callable[[int], None]
) -> Iterator[list["Answer"]]:
    """The answers to ``cases``, batch by batch; ``on_tokens`` is told how many prompt tokens have been read.

    A batch has at most ``batch_size`` tasks, and fewer where the KV pool or a TensorRT plan has no room for more. Raises
    ``CapacityError`` for a task that does not fit even alone, ``EngineError`` where the model computes nonsense.
    """
    n_read = 0
    for batch in _batches(engine, cases, batch_size):
        yield _answers_to_batch(engine, batch, match, _counting_from(n_read, on_tokens))
        n_read += sum(len(case.prompt) for case in batch)


@dataclass(kw_only=True)
class _Running:
    """One task on its way: the request that decodes greedily, and the twin that is fed the expected answer."""

    case: "TaskCase"
    request: "Request"
    twin: "SequenceCache"
    kept_tokens: tuple[int, ...]
    prompt_seconds: float
    answer_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)

    def lose(self, logits_V: "Floats") -> None:
        """Count what logits [V] lose on the next expected token."""
        from trt_kv.calibration.evaluation import answer_losses

        _, (loss,) = answer_losses(logits_V[None], self.case.expected[len(self.losses) :][:1])
        if not math.isfinite(loss):
            raise EngineError(
                f"the engine's logits are not finite at task {self.case.task.name!r}",
                got=f"a loss of {loss}",
                fix="build it with a wider --dtype, or check the checkpoint",
            )
        self.losses.append(float(loss))

    def answer(self, match: Match) -> "Answer":
        from trt_kv.calibration.answers import Answer

        result = self.request.result()
        task = self.case.task
        return Answer(
            line=task.line,
            name=task.name,
            task=task.task,
            right=is_right(result.text, task.accepted, match),
            text=result.text,
            token_ids=result.token_ids,
            loss=sum(self.losses),
            n_expected_tokens=len(self.losses),
            n_prompt_tokens=len(self.case.prompt),
            kept_tokens=self.kept_tokens,
            prompt_seconds=self.prompt_seconds,
            answer_seconds=self.answer_seconds,
        )


def _batches(engine: "Engine", cases: Sequence["TaskCase"], batch_size: int) -> Iterator[list["TaskCase"]]:
    """Neighbouring cases that certainly fit into the pool together; one alone may turn out not to."""
    loaded, page_size = engine.loaded, engine.manifest.page_size
    batch_size = min(batch_size, loaded.batch or batch_size)
    batch: list[TaskCase] = []
    n_taken = 0
    for case in cases:
        n_pages = sum(-(-(len(case.prompt) + n_new) // page_size) for n_new in (case.limit, len(case.expected)))
        if batch and (len(batch) == batch_size or n_taken + n_pages > loaded.layer_pages):
            yield batch
            batch, n_taken = [], 0
        batch.append(case)
        n_taken += n_pages
    if batch:
        yield batch


def _answers_to_batch(
    engine: "Engine", cases: Sequence["TaskCase"], match: Match, on_tokens: Callable[[int], None]
) -> list["Answer"]:
    running: list[_Running] = []
    n_read = 0
    with contextlib.ExitStack() as owned:
        try:
            for case in cases:
                running.append(_read(engine, case, owned, _counting_from(n_read, on_tokens)))
                n_read += len(case.prompt)
            _decode_greedily(engine, running)
            _decode_expected(engine, running)
        except CapacityError as cause:
            raise CapacityError(
                f"task {cases[0].task.name!r} does not fit into the KV pool",
                got=f"{len(cases[0].prompt)} prompt tokens; {cause.got}",
                expected="room for the prompt, then for two copies of what is kept of it and their answers",
                fix="free memory, shorten the prompt, or build with a smaller budget",
            ) from cause
        return [one.answer(match) for one in running]


def _read(engine: "Engine", case: "TaskCase", owned: contextlib.ExitStack, on_chunk: Callable[[int], None]) -> _Running:
    """Read the prompt once, and fork what is kept of it; ``owned`` releases both sequences."""
    from trt_kv.runtime.request import Request
    from trt_kv.runtime.sampling import SamplingParams

    sequence = engine.runner.new_sequence()
    owned.callback(sequence.release)
    started = time.perf_counter()
    logits_V = engine.runner.prefill(sequence, case.prompt, on_chunk=on_chunk)
    seconds = time.perf_counter() - started
    twin = sequence.fork()
    owned.callback(twin.release)
    request = Request(
        prompt_ids=case.prompt,
        params=SamplingParams(max_new_tokens=case.limit),
        tokenizer=engine.tokenizer,
        eos_token_ids=engine.manifest.config.eos_token_ids,
        limit=case.limit,
        sequence=sequence,
    )
    kept = tuple(int(n) for n in sequence.held_tokens)
    one = _Running(case=case, request=request, twin=twin, kept_tokens=kept, prompt_seconds=seconds)
    request.accept(logits_V)
    one.lose(logits_V)
    return one


def _counting_from(before: int, tell: Callable[[int], None]) -> Callable[[int], None]:
    return lambda done: tell(before + done)


def _decode_greedily(engine: "Engine", running: Sequence[_Running]) -> None:
    """Until every request is finished, as ``Engine.generate_batch`` does."""
    while batch := [one for one in running if one.request.finish_reason is None]:
        started = time.perf_counter()
        logits_BV = engine.runner.decode([one.request.sequence for one in batch], [one.request.token_ids[-1] for one in batch])
        for one, logits_V in zip(batch, logits_BV, strict=True):
            one.request.accept(logits_V)
        seconds = (time.perf_counter() - started) / len(batch)
        for one in batch:
            one.answer_seconds += seconds
    for one in running:
        one.request.close()


def _decode_expected(engine: "Engine", running: Sequence[_Running]) -> None:
    while batch := [one for one in running if len(one.losses) < len(one.case.expected)]:
        fed = [one.case.expected[len(one.losses) - 1] for one in batch]
        logits_BV = engine.runner.decode([one.twin for one in batch], fed)
        for one, logits_V in zip(batch, logits_BV, strict=True):
            one.lose(logits_V)
