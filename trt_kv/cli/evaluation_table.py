"""A finished evaluation as text for the terminal."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trt_kv.cache_layers import cache_policy
from trt_kv.calibration.task_files import MATCHES
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.policy_settings import differences, setting_as_text
from trt_kv.printable import printable

if TYPE_CHECKING:
    from trt_kv.calibration.answer_files import EngineFacts, Evaluation, Run

SCORE_HEADER = ("", "tasks", "right", "perplexity", "kept of prompt", "s/task")
COMPARISON_HEADER = ("", "difference", "right only here/there", "verdict", "same answer", "agreement", "perplexity ratio")


def describe_evaluation(evaluation: "Evaluation") -> str:
    """Multi-line text: what was evaluated, a row per group of tasks and one for all, and the comparison with another engine."""
    from trt_kv.calibration.answer_files import summary_of

    summary = summary_of(evaluation)
    rule = MATCHES.get(evaluation.settings.match, evaluation.settings.match)
    lines = [
        f"engine   {_engine(evaluation.run.engine)}",
        f"tasks    {evaluation.n_tasks} of {evaluation.tasks}; right means: {rule}",
        "",
        *_table(SCORE_HEADER, summary, _score_cells),
        *_exempt(evaluation.run),
    ]
    if evaluation.against is not None:
        lines += ["", f"against  {_engine(evaluation.against.engine)}", ""]
        lines += _table(SCORE_HEADER, summary["against"], _score_cells)
        lines += _exempt(evaluation.against)
        lines += ["", *_table(COMPARISON_HEADER, summary["comparison"], _comparison_cells)]
    return "\n".join(map(printable, lines))


def _engine(facts: "EngineFacts") -> str:
    policy = facts.policy
    changed = differences(policy, policy_from_name(policy.name)) if policy.name in policy_names() else {}
    told = " ".join([f"policy {policy.name}", *(setting_as_text(name, value) for name, value in changed.items())])
    return f"{facts.name}: {facts.model_name}, {told}, {facts.dtype} on {facts.runs_on}"


def _exempt(run: "Run") -> list[str]:
    """The kept share over the layers that are not exempt, if some but not all are; those with a window are."""
    exempt = run.engine.applied_policy.exempt_layers
    in_cache = cache_policy(run.engine.applied_policy, run.engine.heads_apart).exempt_layers
    n_others = len(run.answers[0].kept_tokens) - len(in_cache)
    if not exempt or n_others == 0:
        return []
    shares = [answer.kept_share_without(in_cache) for answer in run.answers]
    told = f"{sum(shares) / len(shares):.1%} ({_share(min(shares), 1)}–{_share(max(shares), 1)})"
    return ["", f"kept of prompt includes the exempt layers {', '.join(map(str, exempt))}; without them it is {told}"]


def _score_cells(score: Mapping[str, Any]) -> list[str]:
    right, low_high = score["accuracy"], score["perplexity_95"]
    interval = "" if low_high is None else f" ({low_high[0]:.2f}–{low_high[1]:.2f})"
    return [
        str(score["n_tasks"]),
        f"{right['value']:.0%} ({_share(right['low'])}–{_share(right['high'])})",
        f"{score['perplexity']:.2f}{interval}",
        f"{score['kept_share']:.1%} ({_share(score['least_kept'], 1)}–{_share(score['most_kept'], 1)})",
        f"{score['seconds_per_task']:.2f}",
    ]


def _comparison_cells(comparison: Mapping[str, Any]) -> list[str]:
    same, ratio = comparison["same_answers"], comparison["perplexity_ratio"]
    return [
        f"{100 * comparison['difference']:+.0f} points",
        f"{comparison['wins']}/{comparison['losses']}",
        comparison["verdict"],
        f"{same['value']:.0%} ({_share(same['low'])}–{_share(same['high'])})",
        f"{comparison['agreement']:.0%}",
        "" if ratio is None else f"{ratio['value']:.3f} ({ratio['low']:.3f}–{ratio['high']:.3f})",
    ]


def _share(value: float, digits: int = 0) -> str:
    """A share as a percentage, without the percent sign."""
    return f"{100 * value:.{digits}f}"


def _table(header: Sequence[str], part: Mapping[str, Any], cells: Callable[[Mapping[str, Any]], list[str]]) -> list[str]:
    """Rows of aligned cells: each group's, then the row of all tasks."""
    rows = [
        list(header),
        *([printable(name), *cells(group)] for name, group in part["groups"].items()),
        ["all", *cells(part["overall"])],
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
