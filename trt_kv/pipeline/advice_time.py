"""Times of tokens and prompts, from a probe of this machine: its memory, the KV ops of each kind of layer, steps of an engine.

A decode step takes what its dense layers take, and for each layer a constant and a time per token attended to. A prompt of n
tokens takes n times what the dense layers take, and for each layer a time that grows with n and with n times what it attends
to. The probe (``advice_probe.py``) measures each kind of layer at two lengths.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trt_kv.layer_budget import LayerBudget
from trt_kv.pipeline.advice import MeasuredMachine
from trt_kv.pipeline.advice_model import PlannedPolicy
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.program import OpNode

Nodes = tuple[OpNode, ...]
_MATTER = {
    "CachedAttention": ("window", "soft_cap"),
    "TokenScores": ("window", "per_head", "pooling", "average", "generated"),
    "AdaptiveBudget": ("ranking", "row"),
    "PredictedScores": (),
    "EvictTokens": ("ranking",),
    "RecallAttention": ("summary", "pooling"),
}
"""The attributes of each op that its time depends on."""


@dataclass(frozen=True, kw_only=True)
class LayerTimes:
    """Of kinds of layers (``kind_of`` their nodes) in ms; kinds that were not measured are missing.

    ``prompt``: per token, and per token times token attended to. ``token``: a constant, per token attended to, and per token
    that is cached.
    """

    prompt: Mapping[str, tuple[float, float]]
    token: Mapping[str, tuple[float, float, float]]


class TimeModel:
    """Predicts times from measured ones."""

    def __init__(self, machine: MeasuredMachine, layers: LayerTimes) -> None:
        self._machine = machine
        self._layers = layers

    def token_ms(
        self, planned: PlannedPolicy, attended: Sequence[int], n_cached: int, batch: int, weight_bytes: int
    ) -> tuple[float | None, bool]:
        """Of a decode step of ``batch`` sequences of ``n_cached`` tokens, of which layer l attends to ``attended[l]``; and
        whether it is a lower bound, because no step of the model was measured: then weights are read as fast as memory allows.
        """
        of_caches = self.caches_ms(planned, attended, n_cached)
        if of_caches is None:
            return None, False
        measured, speed = self._machine.step_ms, self._machine.gb_per_s
        if measured is None and speed is None:
            return None, False
        dense = weight_bytes / (speed or 1.0) / 1e6 if measured is None else measured
        return dense + batch * of_caches, measured is None

    def caches_ms(self, planned: PlannedPolicy, attended: Sequence[int], n_cached: int) -> float | None:
        """Of all layers' KV ops for one sequence in a decode step; None if a kind of layer was not measured."""
        total = 0.0
        for nodes, n_attended in zip(planned.programs["decode"], attended, strict=True):
            times = self._layers.token.get(kind_of(nodes))
            if times is None:
                return None
            total += times[0] + times[1] * n_attended + times[2] * n_cached
        return total / planned.heads_apart

    def prompt_s(self, planned: PlannedPolicy, n_tokens: int) -> float | None:
        """Of reading a prompt; None without steps of an engine."""
        of_caches, dense = self.reading_ms(planned, n_tokens), self._machine.prompt_ms_per_token
        return None if of_caches is None or dense is None else (dense * n_tokens + of_caches) / 1e3

    def reading_ms(self, planned: PlannedPolicy, n_tokens: int) -> float | None:
        """Of all layers' KV ops while a prompt is read; None if a kind of layer was not measured."""
        total = 0.0
        for nodes in planned.programs["prefill"]:
            times = self._layers.prompt.get(kind_of(nodes))
            if times is None:
                return None
            total += times[0] * n_tokens + times[1] * n_tokens * min(n_tokens, _window(nodes) or n_tokens)
        return total / planned.heads_apart  # layers were measured with all heads of the model


def kind_of(nodes: Nodes) -> str:
    """What the time of a layer's ops depends on."""
    return json.dumps([[node.op, [node.attributes.get(name) for name in _MATTER[node.op]]] for node in nodes])


def recalls(nodes: Nodes) -> bool:
    """Whether a layer recalls pages."""
    return any(node.op == "RecallAttention" for node in nodes)


def prompt_times(nodes: Nodes, lengths: Sequence[int], measured_ms: Sequence[float]) -> tuple[float, float]:
    """``LayerTimes.prompt`` of a layer that took ``measured_ms`` for two prompts of these ``lengths``."""
    window = _window(nodes)
    return _fitted([(n, n * min(n, window or n)) for n in lengths], measured_ms)


def token_times(
    nodes: Nodes, lengths: Sequence[int], measured_ms: Sequence[float], *, page_size: int, per_attended: float
) -> tuple[float, float, float]:
    """``LayerTimes.token`` of a layer that took ``measured_ms`` in steps with two ``lengths`` of the cache.

    Of a layer that recalls, the time per token attended to is that of plain attention, ``per_attended``, and what is left
    depends on what is cached: its pages are ranked.
    """
    if not recalls(nodes):
        window = _window(nodes)
        return *_fitted([(1, min(n, window or n)) for n in lengths], measured_ms), 0.0
    attended = [_attended_by(nodes, n, page_size) for n in lengths]
    rest = [max(0.0, ms - per_attended * n) for ms, n in zip(measured_ms, attended, strict=True)]
    constant, per_cached = _fitted([(1, n) for n in lengths], rest)
    return constant, per_attended, per_cached


def _fitted(features: Sequence[tuple[float, float]], values: Sequence[float]) -> tuple[float, float]:
    """The a and b, not below 0, for which a x + b y are the two ``values``; if there are none, one of them for the last."""
    (x1, y1), (x2, y2) = features
    determinant = x1 * y2 - x2 * y1
    if determinant:
        a = (values[0] * y2 - values[1] * y1) / determinant
        b = (x1 * values[1] - x2 * values[0]) / determinant
        if a >= 0 and b >= 0:
            return a, b
        if a < 0:
            return 0.0, values[1] / y2
    return values[1] / x2, 0.0


def _window(nodes: Nodes) -> int:
    return next((int(node.attributes.get("window", 0)) for node in nodes if node.op == "CachedAttention"), 0)


def _attended_by(nodes: Nodes, n_cached: int, page_size: int) -> int:
    """The most tokens that a step of a layer that recalls attends to."""
    values = next(node.attributes for node in nodes if node.op == "RecallAttention")
    limits = PageLimits(page_size=page_size, sinks=int(values["sinks"]), recent=int(values["recent"]))
    budget = LayerBudget(share=float(values["kept_share"]), tokens=int(values["kept_tokens"])).of_prompt(n_cached)
    return min(n_cached, limits.n_most(budget) * page_size)
