"""One step of the token-flat graph: all sequences' tokens concatenated along N."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Step:
    """The graph's inputs other than the KV state; all int64. Axes: [N], or those of the op specs (``plugins/tensors.py``)."""

    input_ids: Ints
    positions: Ints
    logit_rows: Ints
    cu_tokens: Ints
    slots: Ints
    page_table: Ints
    kv_len: Ints
    prompt_remaining: Ints
    evict: Ints
    prompt_len: Ints
    adaptive_budget: Ints
    query_rows: Ints
    budget: Ints | None = None
    """[L, B]: tokens that EvictTokens keeps in place of its own share of those that are cached; None: it has no other."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a row's token is to be chosen by an executor; fields as in ``SamplingParams``. ``uniform``: the random number in
    [0, 1) that decides, if the temperature is above 0.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The token that an executor chose for a row, and the row's ``largest`` logit, NaN if any is."""

    token_id: int
    largest: float


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """Outputs of a step other than the KV state: logits [R, V] fp32, and ``kept`` [L, B], the tokens cached afterwards.

    ``adaptive_budget`` [L, B]: budgets that AdaptiveBudget computed for later steps; -1 if it did not, or if the budget was
    only for an eviction in this step. ``corrected`` [L, B, K]: 1 if a KV head drifted and chose pages with its current query
    before attention; None if no layer recalls. ``chosen``: of each row, if the executor was to choose; ``logits`` are then
    empty.
    """

    logits: NDArray[np.floating[Any]]
    kept: Ints
    adaptive_budget: Ints | None = None
    corrected: Ints | None = None
    chosen: tuple[Chosen, ...] | None = None

    @classmethod
    def assemble(cls, step: Step, logits: NDArray[np.floating[Any]], made: Mapping[str, Mapping[int, Ints]]) -> Self:
        """The result of ``step`` from its logits and its ops' results ``made``, by name and layer: ``kept`` and ``budget`` [B],
        ``corrected`` [B, K]. All may have rows or sequences of padding at the end, which are dropped.
        """
        n_sequences = step.kv_len.shape[1]
        kept, adaptive_budget, corrected = step.kv_len.copy(), np.full(step.kv_len.shape, -1), None
        for layer, kept_B in made.get("kept", {}).items():
            kept[layer] = kept_B[:n_sequences]
        for layer, budget_B in made.get("budget", {}).items():
            adaptive_budget[layer] = np.where(step.evict == 1, budget_B[:n_sequences], -1)
        for layer, corrected_BK in made.get("corrected", {}).items():
            if corrected is None:
                corrected = np.zeros((*step.kv_len.shape, corrected_BK.shape[1]), np.int64)
            corrected[layer] = corrected_BK[:n_sequences]
        return cls(logits=logits[: len(step.logit_rows)], kept=kept, adaptive_budget=adaptive_budget, corrected=corrected)
