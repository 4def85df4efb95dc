"""Counters of recall: how often heads were corrected, and how much was copied."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from trt_kv.runtime.backends.step import Ints


@dataclass(kw_only=True)
class RecallStatistics:
    """Counts since the last ``reset``; L layers, K KV heads. A layer-step is one layer of one generated token."""

    n_layers: int
    n_kv_heads: int
    page_head_bytes: int
    layer_steps_L: Ints = field(init=False)
    corrected_LK: Ints = field(init=False)
    corrected_layer_steps_L: Ints = field(init=False)
    moved_ahead_L: Ints = field(init=False)
    """Page-heads that were copied in the background."""
    moved_at_once_L: Ints = field(init=False)
    """Page-heads that were copied before attention, while the step waited."""
    pages_written: int = field(init=False)
    waited_ms: float = field(init=False)
    """Time that steps waited for copies."""

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Set all counts to 0."""
        self.layer_steps_L, self.corrected_layer_steps_L, self.moved_ahead_L, self.moved_at_once_L = (
            np.zeros(self.n_layers, np.int64) for _ in range(4)
        )
        self.corrected_LK = np.zeros((self.n_layers, self.n_kv_heads), np.int64)
        self.pages_written = 0
        self.waited_ms = 0.0

    @property
    def head_rate(self) -> float:
        """Share of (layer-step, KV head) pairs that were corrected."""
        return float(self.corrected_LK.sum()) / max(1, int(self.layer_steps_L.sum()) * self.n_kv_heads)

    @property
    def layer_step_rate(self) -> float:
        """Share of layer-steps in which any KV head was corrected."""
        return float(self.corrected_layer_steps_L.sum()) / max(1, int(self.layer_steps_L.sum()))

    @property
    def moved_bytes(self) -> int:
        return self.page_head_bytes * int(self.moved_ahead_L.sum() + self.moved_at_once_L.sum())

    def to_json(self) -> dict[str, Any]:
        """Counts as lists, and the rates computed from them."""
        counts = {
            name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in dataclasses.asdict(self).items()
        }
        rates = {"head_rate": self.head_rate, "layer_step_rate": self.layer_step_rate, "moved_bytes": self.moved_bytes}
        return counts | rates
