"""Steps of many policies at once: one prefill with every score that some policy needs, one decode step for all forks.

The KV ops are the engines' kernels with the attributes of the engines' programs. The only difference from an engine is that
work shared by several policies is done once.

L layers of the cache, H query heads, K KV heads, D head size, M pages, P page size, B sequences of a step.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from trt_kv.opspec import AttributeValue, OpSpec
from trt_kv.plugins.paging import Floats
from trt_kv.plugins.registry import Kernel, kernel, op_specs
from trt_kv.program import OpNode, Program
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.heads_apart import attend_by_head
from trt_kv.runtime.backends.step import Ints, Step, StepResult
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.model_runner import DROP_ONE

ScoreKey = tuple[tuple[str, AttributeValue], ...]
"""The attributes of a TokenScores node that determine how it scores a prompt, without its layer."""

NOT_SCORING = ("layer", "page_size", "scale", "generated")


@dataclass(frozen=True, kw_only=True)
class LastQuery:
    """AdaptiveBudget's inputs from a prefill in one layer: q [1, H, D] and lse [1, H] of the last prompt token."""

    q: Floats
    lse: Floats


@dataclass(frozen=True, kw_only=True)
class DecodeGroup:
    """Sequences of a decode step, by index, that run the same KV ops after attention."""

    members: Ints
    nodes: Sequence[Sequence[OpNode]]


class SharedSteps:
    """A ``StepExecutor``: prefill scores into one array [M, K, P] per ``ScoreKey``, decode runs the ops of each group.

    ``keys`` must be set before a prefill (all its steps), ``groups`` before a decode step; ``kept`` [L, B] then has the numbers
    of cached tokens.
    """

    def __init__(self, dense: DenseExecutor, pool: KvPool[Any], *, n_layers: int, scale: float) -> None:
        self.dense = dense
        self.keys: Sequence[ScoreKey] = ()
        self.scores: dict[ScoreKey, Floats] = {}
        self.last_queries: list[LastQuery] = []
        self.groups: Sequence[DecodeGroup] = ()
        self.kept: Ints = np.empty((n_layers, 0), np.int64)
        self._common = [{"layer": layer, "page_size": pool.page_size, "scale": scale} for layer in range(n_layers)]

    @property
    def description(self) -> str:
        return self.dense.description

    def warm_up(self) -> None:
        """Does nothing, because the first document compiles what it needs."""

    def run_step(self, phase: str, step: Step, pool: KvPool[Any]) -> StepResult:
        """See ``StepExecutor.run_step``; nothing is evicted in prefill."""
        tensors = step_tensors(step, pool)
        self.kept = step.kv_len.copy()
        if phase == "prefill":
            self.last_queries = []

        def attend(layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
            bound = {**tensors, "q": q, "k": k, "v": v}
            run_nodes([OpNode(op="CachedAttention", attributes=self._common[layer])], bound)
            if phase == "prefill":
                self._score(layer, bound)
            else:
                self._rank_on(layer, bound)
            out: Floats = bound["out"]
            return out

        by_head = attend_by_head(attend, pool.kv.shape[2])
        logits = self.dense.run(step.input_ids, step.positions, step.logit_rows, by_head)
        return StepResult(logits=logits, kept=self.kept)

    def _score(self, layer: int, tensors: dict[str, Any]) -> None:
        self.last_queries.append(LastQuery(q=tensors["q"][-1:].copy(), lse=tensors["lse"][-1:].copy()))
        for key in self.keys:
            if key not in self.scores:
                self.scores[key] = np.empty_like(tensors["scores"])
            node = OpNode(op="TokenScores", attributes={**self._common[layer], **dict(key)})
            run_nodes([node], {**tensors, "scores": self.scores[key]})

    def _rank_on(self, layer: int, tensors: dict[str, Any]) -> None:
        for group in self.groups:
            of_group = {
                **tensors,
                **{name: tensors[name][group.members] for name in ("q", "lse", "positions", "prompt_remaining")},
                **{name: tensors[name][:, group.members] for name in ("slots", "page_table", "kv_len")},
                "cu_tokens": np.arange(len(group.members) + 1),
                "evict": np.full(len(group.members), DROP_ONE),
            }
            run_nodes(group.nodes[layer], of_group)
            if "kept" in of_group:
                self.kept[layer, group.members] = of_group["kept"]


def step_tensors(step: Step, pool: KvPool[Any]) -> dict[str, Any]:
    """The tensors that KV ops may read in a step, by name."""
    arrays = {"kv": pool.kv, "token_positions": pool.token_positions, "scores": pool.scores}
    names = ("positions", "cu_tokens", "slots", "page_table", "kv_len", "prompt_remaining", "evict")
    return {**{name: getattr(step, name) for name in names}, **arrays}


def run_nodes(nodes: Iterable[OpNode], tensors: dict[str, Any]) -> None:
    """Run the CPU kernels of ``nodes`` in order; each reads its inputs from ``tensors`` and adds its outputs."""
    for node in nodes:
        spec, run = _op(node.op)
        inputs = {t.name: tensors[t.name] for t in spec.inputs if not t.optional or t.name in tensors}
        results = run(**inputs, **node.attributes)
        tensors.update(zip((t.name for t in spec.outputs), results, strict=True))


def score_key(program: Program) -> ScoreKey | None:
    """How a prefill program scores; None if it does not."""
    keys = {_key_of(node) for nodes in program for node in nodes if node.op == "TokenScores"}
    assert len(keys) <= 1, "a policy has one score for all its layers"
    return next(iter(keys), None)


def after_attention(program: Program, *, but: Sequence[str] = ()) -> list[list[OpNode]]:
    """Each layer's ops after attention, except those named in ``but``."""
    return [[node for node in nodes if node.op not in ("CachedAttention", *but)] for nodes in program]


def decode_groups(programs: Mapping[int, Program]) -> list[DecodeGroup]:
    """Groups of the sequences (by index) that continue to rank while decoding, by their programs.

    Each step adds one token and evicts one, whatever the budget, so all kept shares of a policy form one group.
    """
    members: dict[str, list[int]] = {}
    nodes: dict[str, list[list[OpNode]]] = {}
    for index, program in programs.items():
        ops = after_attention(program)
        if any(ops):
            sizeless = [
                [(node.op, {k: v for k, v in node.attributes.items() if k not in ("kept_share", "kept_tokens")}) for node in of]
                for of in ops
            ]
            members.setdefault(repr(sizeless), []).append(index)
            nodes[repr(sizeless)] = ops
    return [DecodeGroup(members=np.array(found), nodes=nodes[what]) for what, found in members.items()]


@cache
def _op(name: str) -> tuple[OpSpec, Kernel]:
    return op_specs()[name], kernel(name, "cpu")


def _key_of(node: OpNode) -> ScoreKey:
    return tuple(sorted((name, value) for name, value in node.attributes.items() if name not in NOT_SCORING))
