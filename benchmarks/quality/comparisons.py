"""What a report's results say: what is better, where, and where nothing can be told."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.quality.cell import Cell, Row
from benchmarks.quality.results import PolicyFacts, Results
from trt_kv.calibration.statistics import Verdict, compare_losses, compare_shares

NO_DIFFERENCE: Verdict = "no clear difference"
Compare = Callable[[Row, Row], Verdict]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two policies that differ in one choice, and what that choice is."""

    choice: str
    policy: str
    other: str


COMPARISONS = (
    Comparison(choice="score: window instead of mass, each with its recipe", policy="window", other="prefixkv"),
    Comparison(choice="score: mean instead of sum of the attention, uniform layers", policy="mean-uniform", other="uniform"),
    Comparison(choice="layers: recipe instead of uniform, mass score", policy="prefixkv", other="uniform"),
    Comparison(choice="layers: recipe instead of uniform, window score", policy="window", other="window-uniform"),
    Comparison(choice="layers: pyramid instead of uniform, SnapKV's ranking", policy="pyramidkv", other="snapkv"),
    Comparison(choice="search: offline recipe instead of per input, mass score", policy="prefixkv", other="mass-online"),
    Comparison(choice="search: offline recipe instead of per input, window score", policy="window", other="window-online"),
    Comparison(choice="heads: a ranking per KV head instead of one per layer", policy="window-heads", other="window"),
    Comparison(choice="pooling: over 15 neighbours instead of none", policy="window-pooled", other="window-heads"),
    Comparison(choice="ranking: mass score instead of random tokens, same budgets", policy="prefixkv", other="random-recipe"),
    Comparison(choice="ranking: mass score instead of recency, uniform layers", policy="uniform", other="streamingllm"),
    Comparison(
        choice="ranking: window score instead of recency, uniform layers", policy="window-uniform", other="streamingllm"
    ),
    Comparison(choice="protection: last 32 tokens instead of the last one, mass score", policy="mass-recent", other="prefixkv"),
)


def by_answers(row: Row, other: Row) -> Verdict:
    """Which of two rows gives more exact answers to the same documents."""
    return compare_shares(row.answers, other.answers)


def by_loss(row: Row, other: Row) -> Verdict:
    """Which of two rows finds the right answer (or the text) likelier."""
    return compare_losses(row.losses, other.losses)


def verdicts(cell: Cell, policy: str, other: str, budgets: Sequence[float], compare: Compare) -> dict[float, Verdict]:
    """Which of two policies is better at every kept share at which both were measured."""
    shared = [budget for budget in budgets if cell.has(policy, budget) and cell.has(other, budget)]
    return {budget: compare(cell.row(policy, budget), cell.row(other, budget)) for budget in shared}


def signs(verdicts_by_budget: Mapping[float, Verdict]) -> str:
    """One sign per kept share: + better, - worse, . no clear difference."""
    return "".join({"better": "+", "worse": "-"}.get(verdict, ".") for verdict in verdicts_by_budget.values())


def describe(verdicts_by_budget: Mapping[float, Verdict]) -> str:
    """E.g. "better at 10-30 %, no clear difference at 40-90 %"; the budgets must be in order."""
    budgets = list(verdicts_by_budget)
    found: dict[Verdict, list[float]] = {}
    for budget, verdict in verdicts_by_budget.items():
        found.setdefault(verdict, []).append(budget)
    if len(found) == 1:
        (verdict,) = found
        return f"{verdict} at {'any' if verdict == NO_DIFFERENCE else 'every'} kept share"
    order: tuple[Verdict, ...] = ("better", "worse", NO_DIFFERENCE)
    return ", ".join(f"{verdict} at {ranges_of(found[verdict], budgets)} %" for verdict in order if verdict in found)


def lossless_share(cell: Cell, policy: str, budgets: Sequence[float], compare: Compare) -> float | None:
    """The smallest measured kept share from which on ``policy`` is nowhere clearly worse than the full cache, or None."""
    share = None
    for budget, verdict in sorted(verdicts(cell, policy, cell.full.policy, budgets, compare).items(), reverse=True):
        if verdict == "worse":
            break
        share = budget
    return share


def best_rival(cell: Cell, rivals: Sequence[PolicyFacts], budget: float) -> Row:
    """The best row of a rival at a kept share."""
    best = best_of([cell.row(rival.name, budget) for rival in rivals if cell.has(rival.name, budget)])
    assert best is not None
    return best


def best_of(rows: Sequence[Row]) -> Row | None:
    """The row with the most exact answers; the likeliest one among equals; None of none."""
    return max(rows, key=lambda row: (row.right.count("1"), -sum(row.losses)), default=None)


def against_the_best(results: Results, cell: Cell, policy: str, compare: Compare) -> dict[float, Verdict]:
    """``policy`` against whichever published policy with a kept share is best, at every kept share of the cell's context."""
    rivals = [rival for rival in results.in_groups("published") if not rival.adaptive]
    budgets = [budget for budget in results.settings.at(cell.context_length).budgets if cell.has(policy, budget)]
    return {budget: compare(cell.row(policy, budget), best_rival(cell, rivals, budget)) for budget in budgets}


def worse_places(results: Results, policy: str, rival_of: Callable[[Cell, Row], Row | None]) -> list[tuple[Cell, list[float]]]:
    """The cells of any context in which ``policy`` is clearly worse than a rival, with the kept shares at which it is.

    By exact answers where the task asks, else by loss. ``rival_of`` gives the rival to a row of the cell, None for none.
    """
    places = []
    for cell in results.cells:
        if not cell.is_compared:
            continue
        compare = by_answers if results.task(cell.task).asks else by_loss
        rows = [row for row in cell.rows if row.policy == policy]
        found = [(row, rival) for row in rows if (rival := rival_of(cell, row)) is not None]
        worse = [row.budget or row.mean_kept for row, rival in found if compare(row, rival) == "worse"]
        if worse:
            places.append((cell, worse))
    return places


def row_at_most(results: Results, cell: Cell, policy: str, kept: float) -> Row | None:
    """The row of ``policy`` at the largest measured kept share that is not above ``kept``; None where all are."""
    budgets = [budget for budget in results.settings.at(cell.context_length).budgets if budget <= kept]
    rows = [cell.row(policy, budget) for budget in budgets if cell.has(policy, budget)]
    return rows[-1] if rows else None


def row_at_least(results: Results, cell: Cell, policy: str, kept: float) -> Row | None:
    """The row of ``policy`` at the smallest measured kept share that is not below ``kept``; None where all are."""
    budgets = [budget for budget in results.settings.at(cell.context_length).budgets if budget >= kept]
    rows = [cell.row(policy, budget) for budget in budgets if cell.has(policy, budget)]
    return rows[0] if rows else None


def percent(share: float) -> str:
    """A share as whole percents without the sign."""
    return f"{100 * share:.0f}"


def ranges_of(some: Sequence[float], budgets: Sequence[float]) -> str:
    """``some`` of ``budgets`` as percents, neighbours joined: "10-30, 50"."""
    runs: list[list[float]] = []
    for budget in some:
        if runs and budgets.index(budget) == budgets.index(runs[-1][-1]) + 1:
            runs[-1].append(budget)
        else:
            runs.append([budget])
    return ", ".join(percent(run[0]) if len(run) == 1 else f"{percent(run[0])}–{percent(run[-1])}" for run in runs)
