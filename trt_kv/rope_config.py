"""Rotary position embeddings (RoPE): which channels of a head turn how fast, and how that is rescaled for long contexts."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from trt_kv.errors import CheckpointError

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope", "proportional"]
ROPE_KINDS: tuple[RopeKind, ...] = ("default", "linear", "llama3", "yarn", "longrope", "proportional")
LARGEST_SIZE = 2**24
"""Of anything that a config counts: several times what any model has, so that no file makes a program of a billion layers."""


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Base ``theta`` and how its frequencies are rescaled for contexts beyond training.

    ``factor`` belongs to every kind except ``default`` and ``longrope``; ``low_freq_factor`` and ``high_freq_factor`` to
    ``llama3``, ``original_max_positions`` to ``llama3``, ``yarn`` and ``longrope``.

    ``attention_factor``: on the rotated queries and keys. ``rotary_dim``: only so many channels of each head turn; 0: all.
    ``beta_fast``, ``beta_slow``: turns within the original context beyond which ``yarn`` keeps a frequency, and below which it
    divides it; ``truncate``: to whole channels. ``factors``: of each channel pair, for ``longrope``; ``short_factors``: those
    for contexts up to ``original_max_positions``, if ``factors`` are for longer ones.
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    attention_factor: float = 1.0
    rotary_dim: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    factors: tuple[float, ...] = ()
    short_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise CheckpointError("unsupported RoPE type", got=repr(self.kind), expected="one of " + ", ".join(ROPE_KINDS))
        for field in ("theta", "factor", "attention_factor", "beta_fast", "beta_slow"):
            if not 0.0 < getattr(self, field) < math.inf:
                raise CheckpointError(f"RoPE {field} must be positive", got=getattr(self, field), expected="a number > 0")
        if self.kind == "llama3" and not self.high_freq_factor > self.low_freq_factor > 0.0:
            raise CheckpointError(
                "RoPE type llama3 has invalid frequency factors",
                got=f"low_freq_factor {self.low_freq_factor}, high_freq_factor {self.high_freq_factor}",
                expected="0 < low_freq_factor < high_freq_factor",
            )
        if self.kind in ("llama3", "yarn", "longrope") and not 1 <= self.original_max_positions <= LARGEST_SIZE:
            raise CheckpointError(
                f"RoPE type {self.kind} needs original_max_position_embeddings",
                got=self.original_max_positions,
                expected=f"an integer >= 1 and <= {LARGEST_SIZE}",
            )
        if self.kind == "yarn" and not self.theta > 1.0:
            raise CheckpointError("RoPE type yarn needs a theta above 1", got=self.theta, expected="a number > 1")
        if any(not 0.0 < factor < math.inf for factor in (*self.factors, *self.short_factors)):
            raise CheckpointError("a RoPE factor is out of range", got=list(self.factors), expected="positive numbers")

    def check_head(self, head_dim: int) -> None:
        """``CheckpointError`` unless this RoPE fits heads of ``head_dim`` channels."""
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= head_dim:
            raise CheckpointError(
                "RoPE turns an impossible number of channels",
                got=f"{self.rotary_dim} of {head_dim} per head",
                expected="an even number, at most the head size",
            )
        n_pairs = (self.rotary_dim or head_dim) // 2
        counts = {len(self.factors), len(self.short_factors) or len(self.factors)}
        if self.kind == "longrope" and counts != {n_pairs}:
            raise CheckpointError(
                "RoPE type longrope has not one factor per pair of rotated channels",
                got=f"{len(self.factors)} factors, {len(self.short_factors)} for short contexts",
                expected=f"{n_pairs}",
            )

    def within(self, context: int) -> "RopeConfig":
        """This RoPE in a context of ``context`` positions: the same, unless it has factors for short contexts."""
        if not self.short_factors or context > self.original_max_positions:
            return self
        return dataclasses.replace(self, factors=self.short_factors, short_factors=())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data. Fields of ``_ADDED`` that have their default are left out, as in ``ModelConfig.to_json``."""
        data = dataclasses.asdict(self)
        return {name: value for name, value in data.items() if name not in _ADDED or value != _ADDED[name]}


_FIRST_VERSION = ("theta", "kind", "factor", "low_freq_factor", "high_freq_factor", "original_max_positions")
_ADDED: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(RopeConfig) if field.name not in _FIRST_VERSION
}
"""Fields that the first version did not have, and their defaults."""
