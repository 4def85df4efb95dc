"""LU-KV's calibration (arXiv 2602.08585): all KV heads of all layers evict where it costs answers least.

    u_h(t)  what an answer to the prompt attends to token t, under KV head h
    order   head h evicts its tokens from the lowest-ranked up, by the score that ranks at run time
    C_h(j)  sum of u_h over the first j tokens of that order: what j evictions cost
    hull    the largest convex function below C_h; its slope is the cost of each next eviction
    heap    until the budget is met, the head whose next eviction costs least evicts

Costs along a hull ascend, so taking the cheapest next eviction of all heads again and again takes all evictions in order of
cost; one sorted list does it for every budget at once. Evictions of equal cost are taken from all heads in turn.

L layers, K KV heads, N tokens of a prompt.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_kv.calibration.prefixkv import check_length
from trt_kv.errors import UsageError
from trt_kv.head_shares import N_ROWS, HeadShares, means
from trt_kv.recipe import CREATED_BY, CalibrationRecord, Protected, Recipe, RecipeModel, RecipeSample, RecipeScore

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
LEAST_SHARE = 0.01
"""Of its tokens, each head keeps at least so many."""


@dataclass(frozen=True, kw_only=True)
class Usefulness:
    """Of a prompt's tokens, [L, K, N] floats >= 0 each: ``ranking``, by which heads evict, lowest first; and ``use``, what
    answers attend to, in one unit for all layers and heads.
    """

    ranking: npt.NDArray[np.floating[Any]]
    use: npt.NDArray[np.floating[Any]]

    def __post_init__(self) -> None:
        for name, values in (("ranking", self.ranking), ("use", self.use)):
            if values.ndim != 3 or values.shape != self.ranking.shape or 0 in values.shape:
                raise UsageError(f"the {name} has the wrong shape", got=values.shape, expected="[layers, KV heads, tokens]")
            if not np.isfinite(values).all() or (values < 0.0).any():
                raise UsageError(f"the {name} holds invalid values", got="negative or not finite", expected="numbers >= 0")


UsefulnessOf = Callable[[Sequence[int]], Usefulness]


def calibrate_lukv(
    prompts_token_ids: Sequence[Sequence[int]],
    usefulness_of: UsefulnessOf,
    *,
    budget: float,
    score: RecipeScore,
    model: RecipeModel,
    source: str,
    seed: int | None = None,
    protected: Protected | None = None,
    windowed_layers: Collection[int] = (),
    on_sample: Callable[[int, int], None] | None = None,
) -> Recipe:
    """The recipe of KV heads at 99 budgets, for ``budget``: shares are means over the prompts.

    ``usefulness_of`` leaves ``windowed_layers`` out, which have an attention window and no budget. ``source`` and ``seed``
    describe the origin of the prompts. ``on_sample(done, total)`` is called after each prompt. ``UsageError`` for no prompts,
    and for a prompt not longer than the protected tokens.
    """
    protected = protected or Protected()
    if not prompts_token_ids:
        raise UsageError("there are no prompts to calibrate with", expected="at least one prompt")
    tables, samples = [], []
    for index, token_ids in enumerate(prompts_token_ids):
        check_length(token_ids, protected, f"prompt {index + 1}")
        found = evictions(usefulness_of(token_ids), protected)
        table = found.shares(windowed_layers)
        tables.append(table)
        kept = means(HeadShares(rows=_rows(table)).at(budget))
        samples.append(RecipeSample(n_tokens=len(token_ids), kept=kept, mass=round(found.mass_kept(1.0 - budget), 9)))
        if on_sample is not None:
            on_sample(index + 1, len(prompts_token_ids))
    heads = HeadShares(rows=_rows(np.mean(tables, axis=0)))
    return Recipe(
        method="lukv",
        score=score,
        budget=float(budget),
        kept=means(heads.at(budget)),
        mass=round(float(np.mean([sample.mass for sample in samples])), 9),
        protected=protected,
        model=model,
        calibration=CalibrationRecord(source=source, seed=seed, samples=tuple(samples)),
        curves=None,
        heads=heads,
        created_by=CREATED_BY,
    )


@dataclass(frozen=True, kw_only=True)
class Evictions:
    """The order in which a prompt's tokens are evicted: ``head_E`` says from which of the L * K heads the e-th is, and
    ``use_E`` the use that it had. ``total_use``: of the tokens that may be evicted and those that may not, together.
    """

    head_E: Ints
    use_E: Floats
    total_use: float
    shape: tuple[int, int, int]

    def removed(self, share: float) -> Ints:
        """Tokens removed from each head, [L, K], when ``share`` of all are to go, or as many as may."""
        n_layers, n_kv_heads, n_tokens = self.shape
        n = min(round(share * n_layers * n_kv_heads * n_tokens), len(self.head_E))
        return np.bincount(self.head_E[:n], minlength=n_layers * n_kv_heads).reshape(n_layers, n_kv_heads)

    def mass_kept(self, share: float) -> float:
        """Share of the use that is left when ``share`` of all tokens are to go."""
        n = min(round(share * self.shape[0] * self.shape[1] * self.shape[2]), len(self.use_E))
        return 1.0 if self.total_use == 0.0 else min(1.0, max(0.0, 1.0 - float(self.use_E[:n].sum()) / self.total_use))

    def shares(self, windowed_layers: Collection[int] = ()) -> Floats:
        """Kept share of each head when 1 .. 99 % of all tokens are to go, [99, L, K]; of layers with a window, 1."""
        n_measured, n_kv_heads, n_tokens = self.shape
        shares = np.ones((N_ROWS, n_measured + len(windowed_layers), n_kv_heads))
        measured = [layer for layer in range(shares.shape[1]) if layer not in windowed_layers]
        for row in range(N_ROWS):
            shares[row, measured] = 1.0 - self.removed((row + 1) / 100.0) / n_tokens
        return shares


def evictions(found: Usefulness, protected: Protected) -> Evictions:
    """In which order the heads evict: the ``protected`` first and last tokens never, and never below ``LEAST_SHARE``."""
    n_layers, n_kv_heads, n_tokens = found.use.shape
    n_least = max(1, round(LEAST_SHARE * n_tokens), protected.n_tokens)
    costs, uses, heads, turns = [], [], [], []
    inner = slice(protected.sinks, n_tokens - protected.recent)
    for head in range(n_layers * n_kv_heads):
        layer, kv_head = divmod(head, n_kv_heads)
        order = np.argsort(found.ranking[layer, kv_head, inner], kind="stable")[: n_tokens - n_least]
        use = found.use[layer, kv_head, inner].astype(np.float64)[order]
        costs.append(hull_slopes(use))
        uses.append(use)
        heads.append(np.full(len(use), head))
        turns.append(np.arange(len(use)))
    by_cost = np.lexsort((np.concatenate(heads), np.concatenate(turns), np.concatenate(costs)))
    return Evictions(
        head_E=np.concatenate(heads)[by_cost],
        use_E=np.concatenate(uses)[by_cost],
        total_use=float(found.use.astype(np.float64).sum()),
        shape=(n_layers, n_kv_heads, n_tokens),
    )


def hull_slopes(use_E: Floats) -> Floats:
    """The slopes of the lower convex hull of the cumulative sums of ``use_E``, one for each of its E values; they ascend.

    Neighbours whose mean descends are merged until none does.
    """
    sums: list[float] = []
    counts: list[int] = []
    for value in use_E.tolist():
        total, count = value, 1
        while sums and sums[-1] * count > total * counts[-1]:
            total, count = total + sums.pop(), count + counts.pop()
        sums.append(total)
        counts.append(count)
    return np.repeat(np.array(sums) / np.array(counts), counts) if counts else np.empty(0)


def _rows(table: Floats) -> tuple[tuple[tuple[float, ...], ...], ...]:
    return tuple(tuple(map(tuple, row)) for row in table.round(6).tolist())
