"""Checks of a policy: values out of range, and combinations in which one part would be ignored by another."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from trt_kv.errors import UnknownNameError, UsageError
from trt_kv.scores import all_scores, attention_scores, predicted_scores, score_names

if TYPE_CHECKING:
    from trt_kv.policy import Policy

LARGEST_COUNT = 2**31 - 1
"""More than any context has; graphs hold such numbers in 64 bits."""
LARGEST_POOLING = 9999
"""Bounds the time and memory of pooling."""


def check_policy(policy: "Policy", names: Mapping[str, Mapping[str, str]]) -> None:
    """``UnknownNameError`` or ``UsageError`` with the reason and what to do instead.

    ``names``: the known names of each field that is a name, except ``score``.
    """
    for field, known in {"score": score_names(), **names}.items():
        if getattr(policy, field) not in known:
            raise UnknownNameError(field, getattr(policy, field), known)
    _check_values(policy)
    _check_budget(policy)
    _check_score(policy)
    _check_residency(policy)
    _check_reading(policy)
    _check_draws(policy)


def _check_values(policy: "Policy") -> None:
    if not 0.0 < policy.kept <= 1.0:
        raise UsageError(
            "the budget (share of tokens to keep) is out of range",
            got=policy.kept,
            expected="a number in (0, 1]",
            fix="e.g. --budget 0.5",
        )
    counts = {"window": 1, "pooling": 1, "decode_distance": 1, "tokens": 0, "floor": 0, "sinks": 0, "recent": 0, "seed": 0}
    counts |= {"reserve": 0, "draw_tokens": 0}
    for field, smallest in counts.items():
        value, largest = getattr(policy, field), LARGEST_POOLING if field == "pooling" else LARGEST_COUNT
        if not _is_int(value) or not smallest <= value <= largest:
            raise UsageError(f"{field} is out of range", got=value, expected=f"an integer >= {smallest} and <= {largest}")
    if policy.pooling % 2 == 0:
        raise UsageError("pooling must be odd", got=policy.pooling, expected="an odd number", fix="e.g. pooling=5")
    if not 0.0 <= policy.recent_share <= 1.0:
        raise UsageError("recent_share is out of range", got=policy.recent_share, expected="a number in [0, 1]")
    if not 0.0 < policy.threshold < 1.0:
        raise UsageError("threshold is out of range", got=policy.threshold, expected="a number in (0, 1)")
    if not 1.0 <= policy.beta < math.inf:
        raise UsageError("beta is out of range", got=policy.beta, expected="a number >= 1 (1: flat)")
    exempt = policy.exempt_layers
    if not all(_is_int(layer) and layer >= 0 for layer in exempt) or sorted(set(exempt)) != list(exempt):
        raise UsageError(
            "exempt_layers is not a list of layer numbers",
            got=exempt,
            expected="distinct numbers >= 0 in ascending order",
            fix="e.g. 0,1",
        )


def _check_budget(policy: "Policy") -> None:
    if (policy.scoring.ranks == "nothing") != (policy.budget == "full"):
        raise UsageError(
            f"policy {policy.name!r} combines score {policy.score!r} with budget {policy.budget!r}",
            expected=f"score {_that_rank('nothing')} exactly with budget 'full': a smaller budget needs a ranking, "
            "and a full one ignores it",
        )
    if policy.budget == "full" and policy.kept != 1.0:
        raise UsageError(
            "budget 'full' keeps everything", got=policy.kept, expected=1.0, fix="choose another policy or budget 1"
        )
    if policy.budget in ("unimetric", "constant") and policy.kept != 1.0:
        instead = "threshold" if policy.budget == "unimetric" else "tokens"
        raise UsageError(
            f"budget {policy.budget!r} reads no kept share",
            got=policy.kept,
            expected="no --budget",
            fix=f"set {instead} with --set {instead}=..., or choose --set budget=uniform",
        )
    if (policy.budget == "constant") != (policy.tokens > 0):
        raise UsageError(
            f"budget {policy.budget!r} with tokens {policy.tokens}",
            expected="tokens >= 1 exactly with budget 'constant'",
            fix="e.g. --set budget=constant tokens=512",
        )
    if policy.heads == "own" and policy.budget == "pyramid":
        raise UsageError(
            "budget 'pyramid' gives a share to each layer, not to each KV head",
            got="heads 'own'",
            fix="--set heads=each, or another budget",
        )
    if (policy.budget == "above") != policy.scoring.predicts:
        predicted = _one_of(predicted_scores())
        raise UsageError(
            f"policy {policy.name!r} combines score {policy.score!r} with budget {policy.budget!r}",
            expected=f"score {predicted} exactly with budget 'above': a threshold is of predictions",
            fix=f"--set score={predicted} budget=above heads=own, or another score and budget",
        )
    if policy.budget == "above" and not 0.01 <= policy.kept <= 0.99:
        raise UsageError(
            "budget 'above' has thresholds of whole percentages",
            got=policy.kept,
            expected="a number in [0.01, 0.99]",
            fix="e.g. --budget 0.1",
        )
    if policy.budget == "full" and policy.floor:
        raise UsageError("budget 'full' evicts nothing", got=f"floor {policy.floor}", expected="floor 0")
    if policy.budget == "constant" and policy.floor > policy.tokens:
        raise UsageError(
            "tokens would be ignored: no layer evicts below the floor",
            got=f"tokens {policy.tokens}, floor {policy.floor}",
            expected="floor <= tokens",
            fix="leave floor out",
        )


def _check_reading(policy: "Policy") -> None:
    if policy.evict == "while_reading" and (not policy.evicts or policy.budget in ("unimetric", "above")):
        raise UsageError(
            "evict 'while_reading' needs a budget that is known before the prompt has been read, of tokens that are dropped",
            got=f"budget {policy.budget!r}, residency {policy.residency!r}",
            expected="e.g. budget 'uniform', 'constant' or 'recipe', residency 'dropped'",
            fix="leave evict out, or choose another budget",
        )
    if policy.reserve and policy.evict != "while_reading":
        raise UsageError(
            "reserve applies only to evict 'while_reading'",
            got=f"reserve {policy.reserve}",
            fix="add --set evict=while_reading",
        )


def _check_draws(policy: "Policy") -> None:
    if not 0.0 <= policy.draw_extreme < 1.0:
        raise UsageError("draw_extreme is out of range", got=policy.draw_extreme, expected="a number in [0, 1)")
    if (policy.decode == "draw") != (policy.draw_tokens > 0):
        raise UsageError(
            f"decode {policy.decode!r} with draw_tokens {policy.draw_tokens}",
            expected="draw_tokens >= 1 exactly with decode 'draw'",
            fix="e.g. --set decode=draw draw_tokens=1024",
        )
    if policy.draw_extreme and policy.decode != "draw":
        raise UsageError(
            "draw_extreme applies only to decode 'draw'",
            got=f"draw_extreme {policy.draw_extreme}",
            fix="add --set decode=draw draw_tokens=1024",
        )


def _check_score(policy: "Policy") -> None:
    policy.scoring.check(policy)
    if policy.reads_attention or policy.scoring.predicts:
        return
    made_from_attention = f"score {_one_of(attention_scores())}"
    if policy.budget == "unimetric" and policy.metric_row == "scores":
        raise UsageError(
            "metric_row 'scores' needs a score computed from attention",
            got=f"score {policy.score!r}",
            expected=made_from_attention,
            fix="add e.g. --set score=window, or --set metric_row=query",
        )
    for field, neutral in (("pooling", 1), ("heads", "shared")):
        if getattr(policy, field) != neutral:
            raise UsageError(
                f"{field} applies only to scores computed from attention",
                got=f"{field} {getattr(policy, field)!r} with score {policy.score!r}",
                expected=made_from_attention,
                fix=f"--set {field}={neutral}",
            )


def _check_residency(policy: "Policy") -> None:
    if (policy.scoring.ranks == "pages") != (policy.residency == "host"):
        raise UsageError(
            f"policy {policy.name!r} combines score {policy.score!r} with residency {policy.residency!r}",
            expected=f"score {_that_rank('pages')} exactly with residency 'host': pages are ranked for recall, "
            "tokens for eviction",
        )
    if policy.residency != "host":
        return
    if not -2.0 <= policy.tau <= 2.0:
        raise UsageError("tau is out of range", got=policy.tau, expected="a number in [-2, 2]", fix="e.g. tau=0.8")
    if not 1e-6 <= policy.softmax_scale <= 1e6:
        raise UsageError(
            "softmax_scale is out of range",
            got=policy.softmax_scale,
            expected="a number in [1e-6, 1e6]",
            fix="1 is as published",
        )
    for field, neutral, reason in (
        ("decode", "keep", "with residency 'host' every generated token is kept"),
        ("recent_share", 0.0, "the newest tokens are given as a number: --set recent=..."),
        ("floor", 0, "with residency 'host' nothing is evicted"),
    ):
        if getattr(policy, field) != neutral:
            raise UsageError(
                f"{field} applies only to eviction",
                got=f"{field} {getattr(policy, field)!r} with residency 'host'",
                expected=reason,
            )
    if policy.recent < 1:
        raise UsageError(
            "recent is too small: the newest token is always attended to", got=f"recent {policy.recent}", expected="recent >= 1"
        )
    if policy.budget == "constant" and policy.tokens < policy.sinks + policy.recent:
        raise UsageError(
            "tokens is too small: it includes sinks and recent",
            got=f"tokens {policy.tokens}, sinks {policy.sinks}, recent {policy.recent}",
            expected="tokens >= sinks + recent, and more to recall",
            fix="raise tokens, or lower sinks and recent",
        )
    if policy.budget == "unimetric" and (policy.metric_order, policy.metric_row) != ("position", "query"):
        raise UsageError(
            "with residency 'host' the Uni-Metric accumulates the last query's attention from the newest token back",
            got=f"metric_order {policy.metric_order!r}, metric_row {policy.metric_row!r}",
            expected="metric_order 'position', metric_row 'query'",
            fix="--set metric_order=position",
        )


def _that_rank(ranked: str) -> str:
    return _one_of([repr(score.name) for score in all_scores() if score.ranks == ranked])


def _one_of(names: list[str]) -> str:
    """E.g. "mass, mean_mass or window"."""
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
