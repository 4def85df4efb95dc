"""Runs an engine on tasks: greedy answers, whatever the model recommends, and the likelihood of the expected answers.

Each prompt is prefilled once. After the policy's eviction the sequence is forked: the request continues greedily, its fork is
fed the expected tokens.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from trt_kv.calibration.task_files import Match, is_right
from trt_kv.errors import CapacityError, EngineError, LogitsError

if TYPE_CHECKING:
    from trt_kv.calibration.answers import Answer
    from trt_kv.calibration.task_cases import TaskCase
    from trt_kv.runtime.engine import Engine
    from trt_kv.runtime.request import Request


def answers_to(
    engine: "Engine", cases: Sequence["TaskCase"], *, match: Match, batch_size: int, on_tokens: Callable[[int], None]
) -> Iterator[list["Answer"]]:
    """The answers to ``cases`` in order, as they complete; ``on_tokens`` is called with the number of prompt tokens read.

    At most ``batch_size`` tasks run at once, fewer if the KV pool has no room for more. Raises ``CapacityError`` for a task
    that does not fit even alone, ``EngineError`` for logits that are not finite.
    """
    waiting, running = deque(cases), deque[tuple["TaskCase", "Request"]]()
    n_answered = 0

    def n_read() -> int:
        return n_answered + sum(request.n_prompt_read for _, request in running)

    try:
        while waiting or running:
            while waiting and len(running) < batch_size:
                case = waiting.popleft()
                running.append((case, _request(engine, case)))
                _add(engine, *running[-1])
            told = n_read()
            engine.core.wait(lambda: _is_over(running[0][1]) or n_read() > told)  # noqa: B023  (called before the next iteration)
            on_tokens(n_read())
            answers = []
            while running and _is_over(running[0][1]):
                case, request = running.popleft()
                n_answered += len(case.prompt)
                answers.append(_answer(case, request, match))
            if answers:
                yield answers
    finally:
        for _, request in running:
            engine.core.cancel(request)


def _request(engine: "Engine", case: "TaskCase") -> "Request":
    """The greedy request, with the fork that is fed the expected answer."""
    from trt_kv.runtime.request import Request
    from trt_kv.runtime.sampling import SamplingParams

    expected = Request(
        prompt_ids=case.prompt,
        params=SamplingParams(),
        tokenizer=None,
        eos_token_ids=(),
        limit=len(case.expected),
        forced=case.expected,
    )
    return Request(
        prompt_ids=case.prompt,
        params=SamplingParams(max_new_tokens=case.limit),
        tokenizer=engine.tokenizer,
        eos_token_ids=engine.manifest.config.eos_token_ids,
        limit=case.limit,
        forks=(expected,),
        name=f"task {case.task.name!r}",
    )


def _add(engine: "Engine", case: "TaskCase", request: "Request") -> None:
    try:
        engine.core.add([request])
    except CapacityError as cause:
        raise CapacityError(
            f"task {case.task.name!r} does not fit into the KV pool",
            got=f"{len(case.prompt)} prompt tokens; {cause.got}",
            expected="room for the prompt, then for two copies of what is kept of it and their answers",
            fix=f"{cause.fix}; or build with a smaller budget",
        ) from cause


def _is_over(request: "Request") -> bool:
    return request.is_finished and all(fork.is_finished for fork in request.forks)


def _answer(case: "TaskCase", request: "Request", match: Match) -> "Answer":
    from trt_kv.calibration.answers import Answer

    (scored,) = request.forks
    error = request.error or scored.error
    loss = -math.fsum(scored.log_probabilities)
    if isinstance(error, LogitsError) or (error is None and not math.isfinite(loss)):
        raise EngineError(
            f"the engine's logits are not finite at task {case.task.name!r}",
            got=f"a loss of {loss}" if error is None else error.got,
            fix="build it with a wider --dtype, or check the checkpoint",
        ) from error
    if error is not None:
        raise error
    result, task = request.result(), case.task
    return Answer(
        line=task.line,
        name=task.name,
        task=task.task,
        right=is_right(result.text, task.accepted, match),
        text=result.text,
        token_ids=result.token_ids,
        loss=loss,
        n_expected_tokens=len(case.expected),
        n_prompt_tokens=len(case.prompt),
        kept_tokens=request.prompt_kv_tokens,
        prompt_seconds=request.times.prompt_s,
        answer_seconds=request.times.decode_s,
    )
