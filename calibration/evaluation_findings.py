"""Sentences about a report's results, made from the numbers: what is better, where, and where nothing can be told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from trt_kv.calibration.evaluation import FULL
from trt_kv.calibration.evaluation_results import Results, TaskResults
from trt_kv.calibration.evaluation_statistics import Verdict, compare_losses, compare_shares

NO_DIFFERENCE: Verdict = "no clear difference"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two variants that differ in one choice, and what that choice is."""

    choice: str
    variant: str
    other: str


COMPARISONS = (
    Comparison(choice="score: window instead of mass, each with its recipe", variant="window", other="prefixkv"),
    Comparison(choice="layers: recipe instead of uniform, mass score", variant="prefixkv", other="mass-uniform"),
    Comparison(choice="layers: recipe instead of uniform, window score", variant="window", other="window-uniform"),
    Comparison(choice="search: offline recipe instead of per input, mass score", variant="prefixkv", other="mass-online"),
    Comparison(choice="search: offline recipe instead of per input, window score", variant="window", other="window-online"),
    Comparison(choice="ranking: mass score instead of random tokens, same budgets", variant="prefixkv", other="random"),
    Comparison(choice="ranking: mass score instead of recency, uniform layers", variant="mass-uniform", other="recency"),
    Comparison(choice="ranking: window score instead of recency, uniform layers", variant="window-uniform", other="recency"),
    Comparison(
        choice="protection: last 32 tokens instead of the last one, mass score", variant="mass-recent", other="prefixkv"
    ),
)


def exact_verdicts(results: Results, task: TaskResults, variant: str, other: str) -> dict[float, Verdict]:
    """At every measured kept share, which of two variants gives more exact answers."""
    budgets = results.settings.budgets
    return {b: compare_shares(task.row(variant, b).answers, task.row(other, b).answers) for b in budgets}


def loss_verdicts(results: Results, task: TaskResults, variant: str, other: str) -> dict[float, Verdict]:
    """At every measured kept share, which of two variants finds the right answer (or the text) likelier."""
    budgets = results.settings.budgets
    return {b: compare_losses(task.row(variant, b).losses, task.row(other, b).losses) for b in budgets}


def verdicts(results: Results, task: TaskResults, variant: str, other: str) -> dict[float, Verdict]:
    """At every measured kept share, which of two variants is better: by exact answers where the task asks, else by loss."""
    return (exact_verdicts if task.asks else loss_verdicts)(results, task, variant, other)


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
    return ", ".join(f"{verdict} at {_ranges(found[verdict], budgets)} %" for verdict in order if verdict in found)


def lossless_share(results: Results, task: TaskResults, variant: str) -> float | None:
    """The smallest measured kept share from which on ``variant`` is nowhere clearly worse than the full cache, or None."""
    share = None
    for budget, verdict in sorted(verdicts(results, task, variant, FULL.name).items(), reverse=True):
        if verdict == "worse":
            break
        share = budget
    return share


def preferred_score(results: Results, task: TaskResults) -> str:
    """Which score to take for this task: the one that is better somewhere and worse nowhere, if there is one."""
    found = set(verdicts(results, task, "window", "prefixkv").values()) - {NO_DIFFERENCE}
    if not found:
        return "either"
    if len(found) == 2:
        return "depends on the kept share"
    return "window" if found == {"better"} else "mass"


def percent(share: float) -> str:
    """A share as whole percents without the sign."""
    return f"{100 * share:.0f}"


def _ranges(some: Sequence[float], budgets: Sequence[float]) -> str:
    """``some`` of ``budgets`` as percents, neighbours joined: "10-30, 50"."""
    runs: list[list[float]] = []
    for budget in some:
        if runs and budgets.index(budget) == budgets.index(runs[-1][-1]) + 1:
            runs[-1].append(budget)
        else:
            runs.append([budget])
    return ", ".join(percent(run[0]) if len(run) == 1 else f"{percent(run[0])}–{percent(run[-1])}" for run in runs)
