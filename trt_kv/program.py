"""Programs: the KV ops of each layer of the cache between two graph segments, with their attributes, per phase.

The graph is made from a program and a program is read back from the graph; an engine's manifest contains it, so
that the runtime applies exactly what was built.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trt_kv.cache_layers import cache_config, cache_policy, each_repeated, heads_apart
from trt_kv.errors import EngineError
from trt_kv.layer_budget import LayerBudget, check_exempt_layers, layer_budgets
from trt_kv.model_config import ModelConfig
from trt_kv.opspec import AttributeValue
from trt_kv.policy import Policy
from trt_kv.surrogate import Predictor, neutral_predictor

PHASES = ("prefill", "decode")
PAGE_SUMMARIES = {"minmax": 0, "deviation": 1, "codes": 2}
"""The attribute ``summary`` by page_summary."""

FINDS_BUDGETS = ("AdaptiveBudget", "PredictedScores")
"""Ops that compute a layer's budget from the input."""

GROUP_POOLINGS = {"mean_softmax": 0, "max_softmax": 1, "mean_raw": 2, "max_raw": 3}
"""The attribute ``pooling`` of RecallAttention by group_pooling."""


@dataclass(frozen=True, kw_only=True)
class OpNode:
    """One KV op of one layer: its op_type and every attribute on the node, an ``AttributeValue`` each."""

    op: str
    attributes: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, **self.attributes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "OpNode":
        if "op" not in data:
            raise EngineError("a KV op of the manifest has no name", got=dict(data), expected="a field 'op'")
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items() if key != "op"}
        return cls(op=data["op"], attributes=values)


Program = tuple[tuple[OpNode, ...], ...]
"""For each layer of the cache (``trt_kv/cache_layers.py``), its KV ops in order of execution."""


def program_of_model(
    config: ModelConfig,
    policy: Policy,
    *,
    phase: str,
    page_size: int,
    kept_shares: Sequence[float] | None = None,
    taus: Sequence[float] | None = None,
    predictors: Sequence[Predictor] | None = None,
) -> Program:
    """``program_of`` with the layers, the windows and the arithmetic of attention of a model.

    ``kept_shares``: one for each layer of the cache, so with heads "own" for each KV head of each layer; or then also one for
    each layer, which its heads share. ``predictors``: without it scores are predicted as 0, which takes as long.
    """
    applied = policy.applied_to(config.windows)
    check_exempt_layers(applied, config.n_layers)
    n_apart, cache = heads_apart(config, applied), cache_config(config, applied)
    if kept_shares is not None and len(kept_shares) == config.n_layers:
        kept_shares = each_repeated(kept_shares, n_apart)
    if predictors is None and applied.scoring.predicts:
        predictors = [neutral_predictor(cache)] * cache.n_layers
    return program_of(
        cache_policy(applied, n_apart),
        phase=phase,
        n_layers=cache.n_layers,
        scale=cache.scale,
        page_size=page_size,
        kept_shares=kept_shares,
        taus=taus,
        predictors=predictors,
        windows=cache.windows,
        soft_cap=cache.attention_soft_cap,
    )


def program_of(
    policy: Policy,
    *,
    phase: str,
    n_layers: int,
    scale: float,
    page_size: int,
    kept_shares: Sequence[float] | None = None,
    taus: Sequence[float] | None = None,
    predictors: Sequence[Predictor] | None = None,
    windows: Sequence[int] = (),
    soft_cap: float = 0.0,
) -> Program:
    """The KV ops that ``policy`` puts into each layer in ``phase`` ("prefill" or "decode").

    ``kept_shares`` gives each layer's kept share in (0, 1], for policies that need a recipe; without it every layer keeps
    ``policy.kept``. ``taus`` gives each layer's drift threshold, if drift is calibrated; without it every layer has
    ``policy.tau``. ``predictors``: of each layer, if scores are predicted; without it there are no weights, which shows which
    ops there are. Prefill scores and evicts once, with the prompt's last token. Decode only attends, except for policies that
    continue to rank (decode "rank"); decode "row" only affects which slot the runtime writes to. With a host-resident cache,
    one op attends, recalls pages and stores the query in both phases, and nothing is evicted.

    ``windows``: each layer's attention window in tokens, 0 for none; empty: no layer has one. A layer with a window attends to
    it in both phases, whatever the policy (``Policy.applied_to``). ``soft_cap``: as in CachedAttention.
    """
    policy = policy.applied_to(windows)
    budgets = layer_budgets(policy, n_layers, kept_shares)
    build = _Nodes(policy, scale=scale, page_size=page_size, windows=windows or [0] * n_layers, soft_cap=soft_cap)
    if phase == "prefill" and policy.scoring.predicts:
        predictors = predictors or [Predictor()] * n_layers
        return tuple(
            build.predicting(layer, budget, predictor)
            for layer, (budget, predictor) in enumerate(zip(budgets, predictors, strict=True))
        )
    nodes = build.prefill if phase == "prefill" else build.decode
    if policy.recalls:
        taus = taus or [policy.tau] * n_layers
        return tuple(
            nodes(layer, budget) if layer in policy.exempt_layers else build.recalling(layer, budget, phase, taus[layer])
            for layer, budget in enumerate(budgets)
        )
    return tuple(nodes(layer, budget) for layer, budget in enumerate(budgets))


def recall_nodes(program: Program) -> list[OpNode | None]:
    """Each layer's RecallAttention; None if its cache is not host-resident."""
    return [next((node for node in nodes if node.op == "RecallAttention"), None) for nodes in program]


def recalling_layers(program: Program) -> list[int]:
    """The layers whose cache is host-resident."""
    return [layer for layer, node in enumerate(recall_nodes(program)) if node is not None]


def windows_of(program: Program) -> list[int]:
    """Each layer's attention window in tokens; 0: it has none."""
    attend = [next((node for node in nodes if node.op == "CachedAttention"), None) for nodes in program]
    return [0 if node is None else int(node.attributes.get("window", 0)) for node in attend]


def finds_budgets(program: Program) -> bool:
    """Whether any layer's budget is computed from the input."""
    return any(node.op in FINDS_BUDGETS for nodes in program for node in nodes)


def predictors_of(program: Program) -> list[Predictor | None]:
    """The weights of each layer's PredictedScores; None if it has none."""
    found = [next((node.attributes for node in nodes if node.op == "PredictedScores"), None) for nodes in program]
    names = [field.name for field in dataclasses.fields(Predictor)]
    return [None if values is None else Predictor(**{name: values[name] for name in names}) for values in found]


def eviction_nodes(program: Program) -> list[OpNode | None]:
    """Each layer's EvictTokens; None if nothing is evicted."""
    return [next((node for node in nodes if node.op == "EvictTokens"), None) for nodes in program]


def budgets_of(program: Program) -> list[LayerBudget | None]:
    """Each layer's budget, read from its ops; None if it is computed from the input."""
    budgets: list[LayerBudget | None] = []
    for nodes, evict, recall in zip(program, eviction_nodes(program), recall_nodes(program), strict=True):
        limits = evict or recall
        if any(node.op in FINDS_BUDGETS for node in nodes):
            budgets.append(None)
        elif limits is None:
            budgets.append(LayerBudget(share=1.0))
        else:
            attributes = limits.attributes
            floor = int(attributes.get("floor", 0))
            budgets.append(
                LayerBudget(share=float(attributes["kept_share"]), tokens=int(attributes["kept_tokens"]), floor=floor)
            )
    return budgets


class _Nodes:
    """The nodes of one layer, per phase."""

    def __init__(self, policy: Policy, *, scale: float, page_size: int, windows: Sequence[int], soft_cap: float) -> None:
        self._policy = policy
        self._logits: dict[str, AttributeValue] = {"scale": scale, "soft_cap": soft_cap}
        self._page_size = page_size
        self._windows = windows
        self._score = policy.scoring

    def prefill(self, layer: int, budget: LayerBudget) -> tuple[OpNode, ...]:
        policy = self._policy
        nodes = [self._attention(layer)]
        if not policy.evicts or layer in policy.exempt_layers:
            return tuple(nodes)
        nodes += self._token_scores(layer)
        if policy.budget == "unimetric":
            nodes.append(self._adaptive_budget(layer))
        return (*nodes, self._evict(layer, budget))

    def decode(self, layer: int, budget: LayerBudget) -> tuple[OpNode, ...]:
        policy = self._policy
        nodes = [self._attention(layer)]
        if not policy.evicts or policy.decode != "rank" or layer in policy.exempt_layers:
            return tuple(nodes)
        nodes += self._token_scores(layer)
        return (*nodes, self._evict(layer, budget))

    def predicting(self, layer: int, budget: LayerBudget, predictor: Predictor) -> tuple[OpNode, ...]:
        """In phase "prefill", with predicted scores."""
        policy = self._policy
        if not policy.evicts or layer in policy.exempt_layers:
            return (self._attention(layer),)
        what: dict[str, AttributeValue] = {
            "weights": predictor.weights,
            "frequencies": predictor.frequencies,
            "threshold": predictor.threshold,
            "sinks": policy.sinks,
            "recent": policy.recent,
        }
        scores = OpNode(op="PredictedScores", attributes={**self._common(layer), **what})
        return self._attention(layer), scores, self._evict(layer, budget)

    def recalling(self, layer: int, budget: LayerBudget, phase: str, tau: float) -> tuple[OpNode, ...]:
        policy = self._policy
        what: dict[str, AttributeValue] = {
            "kept_share": budget.share,
            "kept_tokens": budget.tokens,
            "sinks": policy.sinks,
            "recent": policy.recent,
            "tau": tau,
            "summary": PAGE_SUMMARIES[policy.page_summary],
            "pooling": GROUP_POOLINGS[policy.group_pooling],
            "softmax_scale": policy.softmax_scale,
        }
        recall = OpNode(op="RecallAttention", attributes={**self._common(layer), **self._logits, **what})
        if policy.budget == "unimetric" and phase == "prefill":
            return recall, self._adaptive_budget(layer)
        return (recall,)

    def _attention(self, layer: int) -> OpNode:
        window = self._windows[layer]
        return OpNode(op="CachedAttention", attributes={**self._common(layer), **self._logits, "window": window})

    def _token_scores(self, layer: int) -> list[OpNode]:
        """One node, or none if the score does not read attention."""
        if self._score.token_scores is None:
            return []
        policy = self._policy
        what: dict[str, AttributeValue] = {
            "window": 0,
            "per_head": int(policy.heads != "shared"),
            "pooling": policy.pooling,
            "average": 0,
            "generated": int(policy.decode == "rank"),
            "maximum": 0,
            "value_norm": 0,
            **self._score.token_scores(policy),
        }
        return [OpNode(op="TokenScores", attributes={**self._common(layer), **self._logits, **what})]

    def _adaptive_budget(self, layer: int) -> OpNode:
        policy = self._policy
        what: dict[str, AttributeValue] = {
            "threshold": policy.threshold,
            "sinks": policy.sinks,
            "recent": policy.recent,
            "ranking": 1 if policy.metric_order == "position" else self._score.ranking,
            "row": int(policy.metric_row == "scores"),
            "protected_in_norm": int(policy.norm == "sinks_in"),
        }
        return OpNode(op="AdaptiveBudget", attributes={**self._common(layer), **self._logits, **what})

    def _evict(self, layer: int, budget: LayerBudget) -> OpNode:
        policy = self._policy
        what: dict[str, AttributeValue] = {
            "kept_share": budget.share,
            "kept_tokens": budget.tokens,
            "floor": policy.eviction_floor,
            "drop": 1,
            "sinks": policy.sinks,
            "recent": policy.recent,
            "recent_share": policy.recent_share,
            "ranking": self._score.ranking,
            "seed": policy.seed,
        }
        return OpNode(op="EvictTokens", attributes={**self._common(layer), **what})

    def _common(self, layer: int) -> dict[str, AttributeValue]:
        return {"layer": layer, "page_size": self._page_size}
