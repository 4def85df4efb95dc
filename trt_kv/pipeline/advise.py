"""Capacity and policies for a model on this machine: what fits, and how long it takes."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trt_kv.errors import UnknownNameError, UsageError
from trt_kv.pipeline.advice import Advice, PolicyAdvice
from trt_kv.pipeline.advice_model import PlannedPolicy, Subject, open_subject
from trt_kv.pipeline.advice_probe import measure
from trt_kv.pipeline.advice_tasks import measured_on_tasks
from trt_kv.pipeline.advice_time import TimeModel
from trt_kv.pipeline.callbacks import OnNote, OnProgress, ignore
from trt_kv.pipeline.plans import QUANTS, check_kv_dtype
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.program import budgets_of, recalling_layers, windows_of

if TYPE_CHECKING:
    from trt_kv.runtime.backends.host.reservation import HostSizing

DEFAULT_NEW_TOKENS = 128
MOST_BATCH = 256
"""Requests that an engine runs at once, unless it is told otherwise (``trt_kv.runtime.loading.MAX_SEQUENCES``)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdviceRequest:
    """Advice about ``model``: an engine folder, the name of a preset, or a checkpoint.

    ``context``: tokens of a prompt and its answer together, of which ``new_tokens`` are the answer; None: all of the model's
    positions. ``batch``: requests at once. ``memory_bytes``: None for what is free. ``policies``: names; empty for all.
    ``measure``: probe the machine, for times. ``tasks``: a file as for ``EvaluationRequest``, whose first ``limit`` tasks are
    answered under each of ``policies`` (empty: six of them); engines, answers and a picture are written to the folder ``out``.
    """

    model: str
    context: int | None = None
    new_tokens: int = DEFAULT_NEW_TOKENS
    batch: int = 1
    memory_bytes: int | None = None
    quant: str | None = None
    kv_dtype: str | None = None
    page_size: int | None = None
    policies: tuple[str, ...] = ()
    measure: bool = True
    tasks: Path | None = None
    limit: int | None = None
    out: Path = Path("advice")

    def __post_init__(self) -> None:
        for option, value in (("--context", self.context), ("--new-tokens", self.new_tokens), ("--batch", self.batch)):
            if value is not None and value < 1:
                raise UsageError(f"{option} is below 1", got=f"{option} {value}", expected=f"{option} >= 1")
        if self.context is not None and self.context <= self.new_tokens:
            raise UsageError(
                "the context has no room for a prompt",
                got=f"--context {self.context}, of which --new-tokens {self.new_tokens} are the answer",
                expected="a context that is longer than the answer",
                fix="raise --context or lower --new-tokens",
            )
        if self.batch > MOST_BATCH:
            raise UsageError("more requests at once than an engine runs", got=self.batch, expected=f"at most {MOST_BATCH}")
        if self.quant is not None and self.quant not in QUANTS:
            raise UnknownNameError("quantisation of weights", self.quant, tuple(QUANTS))
        check_kv_dtype(self.kv_dtype)
        for name in self.policies:
            policy_from_name(name)
        if self.limit is not None and self.tasks is None:
            raise UsageError("--limit is of tasks", got=f"--limit {self.limit}", fix="add --tasks, or leave it out")


def advise(request: AdviceRequest, *, on_progress: OnProgress = ignore, on_note: OnNote = ignore) -> Advice:
    """Sizes of weights and caches under each policy, what fits into the memory, and the time of a token and of a prompt.

    Sizes are those by which the runtime admits requests. Times are those of this machine, from a probe of some seconds; with an
    engine also from some of its steps. Raises ``UsageError`` for what cannot be, ``CheckpointError`` and ``EngineError`` for
    a model that cannot be read.

    Example::

        from trt_kv.pipeline import AdviceRequest, advise

        advice = advise(AdviceRequest(model="engines/llama3-prefixkv", context=4096, batch=8))
        print({policy.name: policy.largest_batch for policy in advice.policies})
    """
    from trt_kv.runtime.memory import available_bytes

    subject = open_subject(request.model, page_size=request.page_size, kv_dtype=request.kv_dtype, on_note=on_note)
    config = subject.config
    context = config.max_positions if request.context is None else request.context
    if context > config.max_positions or context <= request.new_tokens:
        raise UsageError(
            f"{subject.name} has another number of positions",
            got=f"a context of {context}, of which {request.new_tokens} are the answer",
            expected=f"more than the answer, and at most {config.max_positions}",
            fix="change --context or --new-tokens",
        )
    quant = _quant(request, subject)
    planned = _planned(request, subject)
    memory = available_bytes() if request.memory_bytes is None else request.memory_bytes
    machine, times = measure(subject, planned, batch=request.batch, with_times=request.measure, on_progress=on_progress)
    advice = Advice(
        model=subject.name,
        source=subject.source,
        is_engine=subject.engine is not None,
        context=context,
        new_tokens=request.new_tokens,
        batch=request.batch,
        kv_dtype=subject.kv_dtype,
        memory_bytes=memory,
        quant=quant,
        weights=subject.weights,
        machine=machine,
        policies=(),
        notes=tuple(_notes(subject, planned)),
    )
    advice = dataclasses.replace(advice, policies=tuple(_advice_on(one, subject, advice, times) for one in planned))
    if request.tasks is None:
        return advice
    return measured_on_tasks(
        advice,
        subject,
        tasks=request.tasks,
        out=request.out,
        policies=request.policies,
        limit=request.limit,
        on_progress=on_progress,
        on_note=on_note,
    )


def _quant(request: AdviceRequest, subject: Subject) -> str:
    known = [size.quant for size in subject.weights]
    if request.quant is None:
        return known[0]
    if request.quant not in known:
        raise UsageError(
            "an engine has the weights that it was built with",
            got=f"--quant {request.quant}",
            expected=known[0],
            fix="leave it out",
        )
    return request.quant


def _planned(request: AdviceRequest, subject: Subject) -> list[PlannedPolicy]:
    """The engine's own policy, and those that were asked for."""
    own = subject.own_policy()
    names = request.policies or tuple(policy_names())
    others = [policy_from_name(name) for name in names]
    return [
        *([] if own is None else [own]),
        *(subject.planned(policy) for policy in others if own is None or policy != own.policy),
    ]


def _notes(subject: Subject, planned: list[PlannedPolicy]) -> list[str]:
    notes = []
    if any(one.applied.needs_recipe and not one.is_engine for one in planned):
        notes.append("policies with a recipe are planned with their mean share in each layer; an engine has its own")
    if not all(one.applied.evicts or one.applied.recalls for one in planned if one.policy.budget != "full"):
        notes.append(f"layers of {subject.name} with an attention window keep their window under every policy")
    notes.append(
        "the prefix cache takes up to an eighth of the free memory besides, unless it is told less (prefix_bytes) or none"
    )
    return notes


def _advice_on(planned: PlannedPolicy, subject: Subject, asked: Advice, times: TimeModel | None) -> PolicyAdvice:
    from trt_kv.runtime.reservation import RequestSize

    sizing, new, most = sizing_of(planned, subject), asked.new_tokens, asked.memory_bytes
    besides = asked.weight_bytes + asked.machine.program_bytes

    def size_of(context: int) -> RequestSize:
        return RequestSize(n_prompt=context - new, max_new_tokens=new)

    def total(context: int, batch: int) -> int:
        return besides + sizing.of(size_of(context), batch).n_bytes

    sizes = sizing.of(size_of(asked.context), asked.batch)
    attended = attended_tokens(planned, subject, asked.context, new)
    advice = PolicyAdvice(
        name=planned.policy.name,
        summary=planned.policy.summary,
        is_engine=planned.is_engine,
        pool_bytes=sizes.pool_bytes,
        tier_bytes=sizes.tier_bytes,
        decoding_bytes=sizing.after_reading(size_of(asked.context), asked.batch).n_bytes,
        total_bytes=besides + sizes.n_bytes,
        fits=besides + sizes.n_bytes <= most,
        largest_context=largest(new + 1, subject.config.max_positions, lambda n: total(n, asked.batch) <= most),
        largest_batch=largest(1, MOST_BATCH, lambda n: total(asked.context, n) <= most),
        load_options=sizing.options(sizes),
        attended_tokens=sum(attended) / len(attended),
        is_at_most=None in budgets_of(planned.programs["prefill"]),
    )
    if times is None:
        return advice
    token_ms, is_bound = times.token_ms(planned, attended, asked.context, asked.batch, asked.weight_bytes)
    prompt_s = times.prompt_s(planned, asked.context - new)
    return dataclasses.replace(advice, token_ms=token_ms, is_lower_bound=is_bound, prompt_s=prompt_s)


def sizing_of(planned: PlannedPolicy, subject: Subject) -> "HostSizing":
    """The runtime's sizes of the caches of an engine with this policy."""
    from trt_kv.runtime.backends.host.reservation import HostSizing

    size, kv_dtype = subject.page_size, subject.kv_dtype
    return HostSizing(planned.cache, planned.applied, planned.programs, page_size=size, kv_dtype=kv_dtype)


def attended_tokens(planned: PlannedPolicy, subject: Subject, context: int, new_tokens: int) -> list[int]:
    """Tokens that a decode step attends to in each layer at the end of the context; the most, if budgets depend on prompts."""
    from trt_kv.runtime.cache.draws import most_generated

    policy, n_prompt = planned.applied, context - new_tokens
    limits = PageLimits(page_size=subject.page_size, sinks=policy.sinks, recent=policy.recent)
    recalling, windows = recalling_layers(planned.programs["decode"]), windows_of(planned.programs["decode"])
    most = most_generated(policy, subject.page_size)
    n_generated = new_tokens if most is None else min(new_tokens, most)
    attended = []
    for layer, (budget, window) in enumerate(zip(budgets_of(planned.programs["prefill"]), windows, strict=True)):
        if window:
            attended.append(min(context, window))
        elif budget is None:
            attended.append(context)
        elif layer in recalling:
            attended.append(min(context, limits.n_most(budget.of_prompt(n_prompt)) * limits.page_size))
        else:
            kept = budget.of(n_prompt)
            growth = {"keep": 1.0, "draw": 1.0, "row": kept / n_prompt, "rank": float(kept == n_prompt)}[policy.decode]
            attended.append(min(context, round(kept + n_generated * growth)))
    return attended


def largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from ``low`` to ``high`` that fits, if every smaller one does; 0 if none does."""
    if low > high or not fits(low):
        return 0
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
