"""Presets with some parts replaced by user settings: ``score=window budget=unimetric exempt_layers=none``."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from trt_kv.errors import UnknownNameError, UsageError
from trt_kv.policy import DEFAULT_FLOOR, NAMES, Policy
from trt_kv.scores import score_from_name, scores_that_read

SHARED_BUDGETS = ("uniform", "pyramid", "recipe", "above")
"""Budgets that read the mean kept share."""

SETTABLE = tuple(field.name for field in dataclasses.fields(Policy) if field.name not in ("name", "summary", "residency"))
DEFAULT_KEPT = 0.5

_EVICTION = ("a budget other than full", lambda policy: policy.budget != "full")
_READ_BY: Mapping[str, tuple[str, Callable[[Policy], bool]]] = {
    "kept": (f"budget {', '.join(SHARED_BUDGETS)}", lambda policy: policy.budget in SHARED_BUDGETS),
    "tokens": ("budget constant", lambda policy: policy.budget == "constant"),
    "beta": ("budget pyramid", lambda policy: policy.budget == "pyramid"),
    "threshold": ("budget unimetric", lambda policy: policy.budget == "unimetric"),
    "metric_row": ("budget unimetric", lambda policy: policy.budget == "unimetric"),
    "metric_order": ("budget unimetric", lambda policy: policy.budget == "unimetric"),
    "norm": ("budget unimetric", lambda policy: policy.budget == "unimetric"),
    "decode": ("a budget other than full, or is draw", lambda policy: policy.budget != "full" or policy.draws),
    "draw_tokens": ("decode draw", lambda policy: policy.draws),
    "draw_extreme": ("decode draw", lambda policy: policy.draws),
    "seed": ("decode draw", lambda policy: policy.draws),
    "sinks": _EVICTION,
    "recent": _EVICTION,
    "recent_share": _EVICTION,
    "exempt_layers": _EVICTION,
    "floor": ("a score of tokens, which are evicted", lambda policy: policy.evicts),
    "evict": ("a score of tokens, which are evicted", lambda policy: policy.evicts),
    "reserve": ("evict while_reading", lambda policy: policy.evict == "while_reading"),
    "decode_distance": ("decode row", lambda policy: policy.decode == "row"),
    "tau": ("score pages and drift fixed", lambda policy: policy.recalls and policy.drift == "fixed"),
    "drift": ("score pages", lambda policy: policy.recalls),
    "page_summary": ("score pages", lambda policy: policy.recalls),
    "group_pooling": ("score pages", lambda policy: policy.recalls),
    "softmax_scale": (
        "score pages and group_pooling mean_softmax or max_softmax",
        lambda policy: policy.recalls and policy.group_pooling.endswith("softmax"),
    ),
}


def settings_from_text(pairs: Iterable[str]) -> dict[str, Any]:
    """Values by field from texts like ``"window=64"``; ``UsageError`` for anything else, a field given twice, a bad number."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not text:
            raise UsageError("a setting is NAME=VALUE", got=repr(pair), fix="e.g. --set score=window budget=unimetric")
        if name not in SETTABLE:
            raise UnknownNameError("setting", name, SETTABLE)
        if name in settings:
            raise UsageError("a setting is given twice", got=f"{name}={settings[name]} and {pair}")
        settings[name] = _value(name, text)
    return settings


def policy_with(policy: Policy, settings: Mapping[str, Any]) -> Policy:
    """``policy`` with the fields in ``settings`` replaced, and the fields that are then not read reset to their neutral values.

    A budget that reads a kept share gets 0.5 if the policy had none. ``UsageError`` if a setting would be ignored.
    """
    score, budget = score_from_name(settings.get("score", policy.score)), settings.get("budget", policy.budget)
    neutral: dict[str, Any] = {}
    if budget != policy.budget:
        neutral["kept"] = (DEFAULT_KEPT if policy.kept == 1.0 else policy.kept) if budget in SHARED_BUDGETS else 1.0
        neutral["tokens"] = 0
    residency = "host" if score.ranks == "pages" else "dropped"
    if residency != policy.residency:
        neutral |= {"residency": residency}
        neutral |= {"decode": "keep", "recent_share": 0.0, "recent": max(1, policy.recent)} if residency == "host" else {}
    evicts = residency == "dropped" and budget != "full"
    if not evicts or budget == "constant":
        neutral["floor"] = 0
    elif not policy.evicts:
        neutral["floor"] = DEFAULT_FLOOR
    if residency == "host" or settings.get("decode", "draw") != "draw":
        neutral |= {"draw_tokens": 0, "draw_extreme": 0.0}
    if score.ranks == "pages" and budget == "unimetric":
        neutral |= {"metric_order": "position", "metric_row": "query"}
    if not score.reads_attention:
        neutral |= {"pooling": 1, "heads": _heads_of_predictions(policy) if score.predicts else "shared"}
        if policy.metric_row == "scores":
            neutral["metric_row"] = "query"
    changed = dataclasses.replace(policy, **(neutral | dict(settings)))
    for name in settings:
        if not _is_read(name, changed):
            readers = _readers(name)
            raise UsageError(
                f"the setting {name!r} would be ignored",
                got=f"{name}={settings[name]} with score {changed.score}, budget {changed.budget}, decode {changed.decode}",
                expected=readers,
                fix=f"leave {name} out, or choose {readers}",
            )
    return changed


def _heads_of_predictions(policy: Policy) -> str:
    """Predictions are of KV heads."""
    return "own" if policy.heads == "shared" else policy.heads


def differences(policy: Policy, preset: Policy) -> dict[str, Any]:
    """The settings that make ``policy`` from ``preset``, as ``policy_with`` takes them."""
    differing = (name for name in SETTABLE if getattr(policy, name) != getattr(preset, name))
    return {name: getattr(policy, name) for name in differing if _is_read(name, policy)}


def setting_as_text(name: str, value: Any) -> str:
    """The setting as NAME=VALUE, which ``settings_from_text`` reads back."""
    if isinstance(value, tuple):
        value = ",".join(map(str, value)) or "none"
    return f"{name}={value}"


def _is_read(name: str, policy: Policy) -> bool:
    """Whether ``policy`` reads the setting; True for settings without a listed reader."""
    if name in _READ_BY and _READ_BY[name][1](policy):
        return True
    return name in policy.scoring.settings or not _readers(name)


def _readers(name: str) -> str:
    """The parts that read the setting, e.g. "score window"; "" if none are listed."""
    scores = scores_that_read(name)
    readers = [f"score {', '.join(scores)}"] if scores else []
    readers += [_READ_BY[name][0]] if name in _READ_BY else []
    return " or ".join(readers)


def _value(name: str, text: str) -> Any:
    default = getattr(Policy(name="", summary=""), name)
    if name in NAMES:
        return text
    try:
        if isinstance(default, tuple):
            return () if text == "none" else tuple(int(part) for part in text.split(","))
        return type(default)(text)
    except ValueError as error:
        kinds = {int: "an integer", float: "a number", tuple: "layer numbers like 0,1, or none"}
        raise UsageError(f"the setting {name!r} has a bad value", got=repr(text), expected=kinds[type(default)]) from error
