"""Paired comparisons of rows on the same documents, and the rival that each row is compared with."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality.cell import Cell, Row
from benchmarks.quality.results import PolicyFacts, Results
from trt_kv.calibration.statistics import Verdict, compare_losses, compare_shares

REFREEKV = "refreekv"
Compare = Callable[[Row, Row], Verdict]
Rival = Callable[[Cell, Row], Row | None]
"""The row that a row of a cell is compared with; None if there is none."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two policies that differ in one choice, and a description of that choice."""

    choice: str
    policy: str
    other: str


COMPARISONS = (
    Comparison(choice="score: window instead of mass, each with its recipe", policy="window", other="prefixkv_paper"),
    Comparison(choice="score: mean instead of sum of the attention, uniform layers", policy="mean-uniform", other="uniform"),
    Comparison(choice="layers: recipe instead of uniform, mass score", policy="prefixkv_paper", other="uniform"),
    Comparison(choice="layers: recipe instead of uniform, window score", policy="window", other="window-uniform"),
    Comparison(choice="layers: pyramid instead of uniform, SnapKV's ranking", policy="pyramidkv", other="snapkv"),
    Comparison(choice="search: offline recipe instead of per input, mass score", policy="prefixkv_paper", other="mass-online"),
    Comparison(choice="search: offline recipe instead of per input, window score", policy="window", other="window-online"),
    Comparison(choice="heads: a ranking per KV head instead of one per layer", policy="window-heads", other="window"),
    Comparison(choice="pooling: over 15 neighbours instead of none", policy="window-pooled", other="window-heads"),
    Comparison(
        choice="ranking: mass score instead of random tokens, same budgets", policy="prefixkv_paper", other="random-recipe"
    ),
    Comparison(choice="ranking: mass score instead of recency, uniform layers", policy="uniform", other="streamingllm"),
    Comparison(
        choice="ranking: window score instead of recency, uniform layers", policy="window-uniform", other="streamingllm"
    ),
    Comparison(
        choice="protection: last 32 tokens instead of the last one, mass score", policy="mass-recent", other="prefixkv_paper"
    ),
)


def by_answers(row: Row, other: Row) -> Verdict:
    """Which of two rows gives more exact answers to the same documents."""
    return compare_shares(row.answers, other.answers)


def by_loss(row: Row, other: Row) -> Verdict:
    """Which of two rows gives the right answer (or the text) a higher likelihood."""
    return compare_losses(row.losses, other.losses)


def verdicts(cell: Cell, policy: str, other: str, budgets: Sequence[float], compare: Compare) -> dict[float, Verdict]:
    """Which of two policies is better at every kept share at which both were measured."""
    shared = [budget for budget in budgets if cell.has(policy, budget) and cell.has(other, budget)]
    return {budget: compare(cell.row(policy, budget), cell.row(other, budget)) for budget in shared}


def signs(verdicts_by_budget: Mapping[float, Verdict]) -> str:
    """One sign per kept share: + better, - worse, . no clear difference."""
    return "".join({"better": "+", "worse": "-"}.get(verdict, ".") for verdict in verdicts_by_budget.values())


def lossless_share(cell: Cell, policy: str, budgets: Sequence[float], compare: Compare) -> float | None:
    """The smallest measured kept share from which on ``policy`` is nowhere clearly worse than the full cache, or None."""
    share = None
    for budget, verdict in sorted(verdicts(cell, policy, cell.full.policy, budgets, compare).items(), reverse=True):
        if verdict == "worse":
            break
        share = budget
    return share


def best_rival(cell: Cell, rivals: Sequence[PolicyFacts], budget: float | None) -> Row | None:
    """The best row at a kept share: most exact answers, ties by the likelihood of the right answer."""
    rows = [cell.row(rival.name, budget) for rival in rivals if budget is not None and cell.has(rival.name, budget)]
    return max(rows, key=lambda row: (row.right.count("1"), -sum(row.losses)), default=None)


def best_published(results: Results, *, keeps_more: bool = False) -> Rival:
    """The best published policy at the row's kept share.

    For a policy with an adaptive budget: at the largest measured share that is not above the row's, or with ``keeps_more`` at
    the smallest one that is not below it.
    """
    rivals = [rival for rival in results.in_groups("published") if not rival.adaptive]

    def rival_of(cell: Cell, row: Row) -> Row | None:
        budgets = results.settings.at(cell.context_length).budgets
        if row.budget is not None:
            return None if keeps_more else best_rival(cell, rivals, row.budget)
        if keeps_more:
            return best_rival(cell, rivals, min((b for b in budgets if b >= row.mean_kept), default=None))
        return best_rival(cell, rivals, max((b for b in budgets if b <= row.mean_kept), default=None))

    return rival_of


def rivals_of_ours(results: Results) -> dict[str, Rival]:
    """Rivals of our policies by name; all but the first two apply only to policies with an adaptive budget."""
    return {
        "full cache": lambda cell, _row: cell.full,
        "best published": best_published(results),
        "best published that keeps more": best_published(results, keeps_more=True),
        REFREEKV: lambda cell, row: cell.row(REFREEKV) if row.budget is None else None,
    }


def against(cell: Cell, policy: str, rival_of: Rival, compare: Compare) -> dict[float, Verdict]:
    """Every row of ``policy`` against its rival, by kept share."""
    rows = [row for row in cell.rows if row.policy == policy]
    found = [(row, rival) for row in rows if (rival := rival_of(cell, row)) is not None]
    return {row.budget or row.mean_kept: compare(row, rival) for row, rival in found}


def compare_of(results: Results, cell: Cell) -> Compare:
    """By exact answers if the task asks for one, else by loss."""
    return by_answers if results.asks(cell) else by_loss


def row_at_most(results: Results, cell: Cell, policy: str, kept: float) -> Row | None:
    """The row of ``policy`` at the largest measured kept share that is not above ``kept``; None where all are."""
    budgets = [budget for budget in results.settings.at(cell.context_length).budgets if budget <= kept]
    rows = [cell.row(policy, budget) for budget in budgets if cell.has(policy, budget)]
    return rows[-1] if rows else None


def percent(share: float) -> str:
    """A share as whole percents without the sign."""
    return f"{100 * share:.0f}"
