"""Each layer's drift threshold, from how much the queries of adjacent tokens differ while a model generates.

For a KV head, C = the mean over its query heads of cos(q_i, q_(i-1)) (FreeKV, arXiv 2505.13109, section 4); it is corrected
where C < tau. A layer's tau is the quantile of its C's at the given rate, so that this share of its (step, KV head) pairs is
corrected in every layer. Prompts are continued with every head corrected in every step, so that the measurement does not
depend on the tau to be found.

L layers, S steps, K KV heads, D head size.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_kv.drift import (
    ALWAYS,
    NEVER,
    Drift,
    DriftHead,
    DriftLayer,
    DriftRecord,
    DriftSample,
    DriftSettings,
    check_correction_rate,
)
from trt_kv.errors import UsageError
from trt_kv.plugins.paging import pages_of
from trt_kv.plugins.recall_attention.choice import best_pages, cosines
from trt_kv.plugins.recall_attention.page_counts import PageLimits, budget_tokens
from trt_kv.plugins.registry import Kernel
from trt_kv.recipe import CREATED_BY, RecipeModel

Floats = npt.NDArray[np.float64]

# Denser at low cosines, where thresholds lie.
SHARES = (0.0, 0.005, 0.01, 0.02, 0.03, *(round(0.05 * i, 2) for i in range(1, 20)), 0.98, 0.99, 1.0)
_DECIMALS = 6


@dataclass(frozen=True, kw_only=True)
class LayerTrace:
    """One layer over the steps after one prompt.

    Both [S, K] float64. ``cosine``: C of each step and KV head, NaN if a query is zero. ``overlap``: share of the
    pages chosen with the step's own query that the query before would have chosen too; NaN if all pages fit into the budget.
    """

    cosine: Floats
    overlap: Floats


Trace = Mapping[int, LayerTrace]
"""The measurement of one prompt, by layer; layers that recall nothing are left out."""
TraceOf = Callable[[Sequence[int]], Trace]
"""Continues a prompt and returns its measurement."""


class DriftRecorder:
    """RecallAttention that records cosines and overlaps for the generated tokens of one sequence, and runs ``kernel``."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._cosines: dict[int, list[Floats]] = {}
        self._overlaps: dict[int, list[Floats]] = {}

    def __call__(self, **tensors: Any) -> tuple[Any, ...]:
        """The kernel's results; takes the inputs and attributes of the op's spec by name. ``UsageError`` for more than one
        sequence.
        """
        if tensors["kv_len"].shape[1] != 1:
            raise UsageError("drift can be recorded for one sequence only", got=tensors["kv_len"].shape[1], expected=1)
        if tensors["prompt_remaining"][-1] < 0:
            layer, n_kv_heads = tensors["layer"], tensors["kv"].shape[2]
            now_HD, before_HD = tensors["q"][-1], tensors["last_query"][tensors["query_rows"][layer, 0]]
            self._cosines.setdefault(layer, []).append(cosines(now_HD, before_HD, n_kv_heads))
            self._overlaps.setdefault(layer, []).append(_overlap(now_HD, before_HD, tensors))
        return self._kernel(**tensors)

    def taken(self) -> Trace:
        """Return what was recorded, and reset the recorder for the next sequence."""
        trace = {
            layer: LayerTrace(cosine=np.array(found), overlap=np.array(self._overlaps[layer]))
            for layer, found in self._cosines.items()
        }
        self._cosines, self._overlaps = {}, {}
        return trace


def calibrate_drift(
    prompts_token_ids: Sequence[Sequence[int]],
    trace_of: TraceOf,
    *,
    correction_rate: float,
    model: RecipeModel,
    settings: DriftSettings,
    source: str,
    seed: int | None = None,
    max_new_tokens: int,
    on_sample: Callable[[int, int], None] | None = None,
) -> Drift:
    """The thresholds at which ``correction_rate`` of each layer's KV heads would have been corrected after these prompts.

    ``source``, ``seed`` and ``max_new_tokens`` are recorded. ``on_sample(done, total)`` is called after each prompt.
    ``UsageError`` for no prompts, a rate outside (0, 1), or prompts after which nothing was generated.
    """
    check_correction_rate(correction_rate, error=UsageError)
    if not prompts_token_ids:
        raise UsageError("there are no prompts to calibrate with", expected="at least one prompt")
    traces = []
    for index, token_ids in enumerate(prompts_token_ids):
        traces.append(trace_of(token_ids))
        if on_sample is not None:
            on_sample(index + 1, len(prompts_token_ids))
    samples = [
        DriftSample(n_tokens=len(ids), n_steps=max((len(found.cosine) for found in trace.values()), default=0))
        for ids, trace in zip(prompts_token_ids, traces, strict=True)
    ]
    if not any(sample.n_steps for sample in samples):
        raise UsageError(
            "nothing was generated after the prompts",
            got=f"{len(samples)} prompts, each followed by an end-of-text token at once, or no layer that recalls",
            expected="prompts that the model continues, and a layer that is not exempt",
            fix="give other --prompts, or exempt fewer layers",
        )
    layers = []
    for layer in sorted({layer for trace in traces for layer in trace}):
        found = [trace[layer] for trace in traces if layer in trace]
        cosine_SK = np.concatenate([one.cosine for one in found])
        overlap_SK = np.concatenate([one.overlap for one in found])
        layers.append(_layer(layer, cosine_SK, overlap_SK, correction_rate))
    return Drift(
        correction_rate=float(correction_rate),
        model=model,
        settings=settings,
        calibration=DriftRecord(source=source, seed=seed, max_new_tokens=max_new_tokens, samples=tuple(samples)),
        shares=SHARES,
        layers=tuple(layers),
        created_by=CREATED_BY,
    )


def threshold_at(cosine_N: Floats, rate: float) -> float:
    """The largest tau, exact in fp32, with at most ``rate`` of the cosines below it; ``ALWAYS`` if that may be all of them.

    The op takes tau in fp32 and corrects if not C >= tau, so NaN is below every tau. The result does not decrease with the
    rate and is at least ``NEVER``. ``UsageError`` for no cosines or a rate outside [0, 1].
    """
    if not len(cosine_N) or not 0.0 <= rate <= 1.0:
        raise UsageError(
            "invalid rate or no cosines", got=f"rate {rate} of {len(cosine_N)}", expected="a rate in [0, 1], some cosines"
        )
    ranked_N = np.sort(np.where(np.isnan(cosine_N), -np.inf, cosine_N).ravel())
    n_below = math.floor(rate * len(ranked_N) + 1e-9)
    if n_below >= len(ranked_N):
        return ALWAYS
    tau = np.float32(ranked_N[n_below])
    if float(tau) > ranked_N[n_below]:
        tau = np.nextafter(tau, np.float32(-np.inf))
    # The shortest decimal of an fp32 number, so that the file and the node's attribute hold the same number.
    return min(ALWAYS, max(NEVER, float(str(tau))))


def rate_at(cosine: Floats, tau: float) -> float:
    """Share of the cosines that the op would correct at ``tau``."""
    return float(np.mean(~(cosine >= np.float32(tau))))


def _layer(layer: int, cosine_SK: Floats, overlap_SK: Floats, rate: float) -> DriftLayer:
    tau = threshold_at(cosine_SK.ravel(), rate)
    heads = [
        DriftHead(
            cosine=_quantiles(cosine_S),
            mean=round(float(np.nan_to_num(cosine_S).mean()), _DECIMALS),
            rate=round(rate_at(cosine_S, tau), _DECIMALS),
            overlap=None if np.isnan(overlap_S).all() else round(float(np.nanmean(overlap_S)), _DECIMALS),
        )
        for cosine_S, overlap_S in zip(cosine_SK.T, overlap_SK.T, strict=True)
    ]
    lowest_S = np.where(np.isnan(cosine_SK).any(axis=1), np.nan, cosine_SK.min(axis=1))
    return DriftLayer(
        layer=layer,
        tau=tau,
        rate=round(rate_at(cosine_SK, tau), _DECIMALS),
        step_rate=round(rate_at(lowest_S, tau), _DECIMALS),
        cosine=_quantiles(cosine_SK.ravel()),
        lowest=_quantiles(lowest_S),
        heads=tuple(heads),
    )


def _quantiles(cosine_N: Floats) -> tuple[float, ...]:
    """The cosines at ``SHARES`` of their ranking, each a measured value; NaN counts as -1."""
    found = np.quantile(np.where(np.isnan(cosine_N), -1.0, cosine_N), SHARES, method="lower")
    return tuple(np.clip(found, -1.0, 1.0).round(_DECIMALS).tolist())


def _overlap(now_HD: Floats, before_HD: Floats, tensors: Mapping[str, Any]) -> Floats:
    """[K]: share of the pages that ``now_HD`` chooses in this step which ``before_HD`` would choose in it too."""
    layer, page_size, n_kv_heads = tensors["layer"], tensors["page_size"], tensors["kv"].shape[2]
    n_cached = int(tensors["kv_len"][layer, 0])
    limits = PageLimits(page_size=page_size, sinks=tensors["sinks"], recent=tensors["recent"])
    adaptive_budget = int(tensors["adaptive_budget"][layer, 0])
    budget = budget_tokens(int(tensors["prompt_len"][0]), adaptive_budget, tensors["kept_share"], tensors["kept_tokens"])
    between = limits.choosable(n_cached)
    n_chosen = limits.n_chosen(budget)
    if not 0 < n_chosen < len(between):
        return np.full(n_kv_heads, np.nan)
    candidates = pages_of(tensors["page_table"], layer, 0, n_cached, page_size)[between.start : between.stop]
    now_KC, before_KC = (
        best_pages(probe_HD, candidates, tensors["summaries"], n_chosen, tensors["pooling"], tensors["softmax_scale"])
        for probe_HD in (now_HD, before_HD)
    )
    return np.array([len(np.intersect1d(now, before)) / n_chosen for now, before in zip(now_KC, before_KC, strict=True)])
