"""What stands between the dense pieces of each layer: the KV ops and their attributes, per phase.

The graph is made from a program and a program is read back from the graph; an engine's manifest carries it so that the
runtime applies exactly what was built.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trt_kv.errors import EngineError
from trt_kv.policy import Policy

PHASES = ("prefill", "decode")

AttributeValue = int | float | str


@dataclass(frozen=True, kw_only=True)
class OpNode:
    """One KV op of one layer: its op_type and every attribute on the node."""

    op: str
    attributes: Mapping[str, AttributeValue]

    def to_json(self) -> dict[str, Any]:
        return {"op": self.op, **self.attributes}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "OpNode":
        if "op" not in data:
            raise EngineError("a KV op of the manifest has no name", got=dict(data), expected="a field 'op'")
        return cls(op=data["op"], attributes={key: value for key, value in data.items() if key != "op"})


Program = tuple[tuple[OpNode, ...], ...]
"""For each layer, its KV ops in order of execution."""


def program_of(
    policy: Policy, *, phase: str, n_layers: int, scale: float, page_size: int, kept_shares: Sequence[float] | None = None
) -> Program:
    """The KV ops that ``policy`` puts into each layer in ``phase`` ("prefill" or "decode").

    ``kept_shares`` gives each layer's kept share in (0, 1]; without it every layer keeps ``policy.kept``. Prefill scores and
    evicts (once, PrefixKV section 1a); decode only attends, and evicts by slot reuse, which is the runtime's choice of slots.
    """
    shares = [policy.kept] * n_layers if kept_shares is None else list(kept_shares)
    layers = []
    for layer in range(n_layers):
        common: dict[str, AttributeValue] = {"layer": layer, "page_size": page_size}
        nodes = [OpNode(op="CachedAttention", attributes={**common, "scale": scale})]
        if phase == "prefill" and policy.evicts:
            window = policy.window if policy.score == "window" else 0
            nodes.append(OpNode(op="TokenScores", attributes={**common, "scale": scale, "window": window}))
            protected = {"sinks": policy.sinks, "recent": policy.recent}
            nodes.append(OpNode(op="EvictTokens", attributes={**common, "kept_share": shares[layer], **protected}))
        layers.append(tuple(nodes))
    return tuple(layers)
