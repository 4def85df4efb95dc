"""What ``trt-kv advise`` finds out: sizes of weights and caches, what fits, and how long a token takes."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class WeightSize:
    """Bytes of the weights in one quantisation: those that a step reads, as they lie in the engine's files."""

    quant: str
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class MeasuredMachine:
    """``gb_per_s``: 10^9 bytes per second that all threads read together; None if no times were asked for. ``probe_s``: how
    long measuring took.

    ``step_ms``, ``prompt_ms_per_token``: of the given engine without its attention to the cache, per step of the batch and
    per token of a prompt; None without an engine. ``program_bytes``: resident memory of a process that has loaded the
    runtime, or the engine, besides weights and caches.
    """

    gb_per_s: float | None
    n_threads: int
    probe_s: float
    program_bytes: int
    step_ms: float | None = None
    prompt_ms_per_token: float | None = None


@dataclass(frozen=True, kw_only=True)
class PolicyAdvice:
    """One policy at the requested context and batch.

    ``pool_bytes`` and ``tier_bytes``: what requests reserve at most, as admission counts it; ``decoding_bytes``: together,
    once all prompts have been read. ``total_bytes``: with weights and program. ``largest_context``: at the requested batch, 0
    if none fits; ``largest_batch``: at the requested context. ``load_options``: of ``Engine.load``, for pools of this size.
    ``attended_tokens``: that a decode step attends to at the end, mean over layers. ``is_at_most``: budgets depend on the
    prompt, so that bytes are upper bounds. ``token_ms``: a decode step of the whole batch at the end of the context;
    ``prompt_s``: one prompt; None: not measured. ``is_lower_bound``: of ``token_ms``, whose dense layers then take no more
    than memory must deliver.
    """

    name: str
    summary: str
    is_engine: bool
    pool_bytes: int
    tier_bytes: int
    decoding_bytes: int
    total_bytes: int
    fits: bool
    largest_context: int
    largest_batch: int
    load_options: dict[str, int]
    attended_tokens: float
    is_at_most: bool
    token_ms: float | None = None
    is_lower_bound: bool = False
    prompt_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class MeasuredPolicy:
    """A policy's answers to tasks: the share of right ones with its 95 % interval, mean bytes cached after a prompt has been
    read, and time. ``on_front``: no other policy is at least as good in all three and better in one. ``fits``: what was asked
    for.
    """

    name: str
    n_tasks: int
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    cache_bytes: int
    seconds_per_task: float
    fits: bool
    on_front: bool = False


@dataclass(frozen=True, kw_only=True)
class Advice:
    """The answer to an ``AdviceRequest``. ``weights``: in each quantisation; ``quant``: the one that the policies are with.

    ``measured``: on tasks, if there were any; ``recommendation``: the name of one of these; ``picture``: a PNG of them.
    """

    model: str
    source: str
    is_engine: bool
    context: int
    new_tokens: int
    batch: int
    kv_dtype: str
    memory_bytes: int
    quant: str
    weights: tuple[WeightSize, ...]
    machine: MeasuredMachine
    policies: tuple[PolicyAdvice, ...]
    notes: tuple[str, ...] = ()
    measured: tuple[MeasuredPolicy, ...] = ()
    recommendation: str | None = None
    picture: str | None = None

    @property
    def weight_bytes(self) -> int:
        """Of the quantisation that the policies are with."""
        return next(size.n_bytes for size in self.weights if size.quant == self.quant)

    def to_json(self) -> dict[str, Any]:
        """As JSON: the fields, and a version of the format."""
        return {"format": "trt-kv-advice", "version": 1, **dataclasses.asdict(self)}
