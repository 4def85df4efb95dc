"""Answers of an engine to a file of tasks, and their statistics: of one engine, and compared with another.

L layers, T tokens of an answer, V vocabulary. Every statistic is computed from the answers alone, so that a results file
can be verified.
"""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from trt_kv.calibration.statistics import (
    Estimate,
    Verdict,
    compare_shares,
    perplexity_interval,
    perplexity_ratio,
    wilson_interval,
)
from trt_kv.errors import ReportError

Floats = npt.NDArray[np.floating[Any]]
UNNAMED = "(other)"
"""Name of the group of tasks that name none, if others do."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An engine's answer to one task.

    ``text`` and ``token_ids``: its greedy answer, ``right`` or not. ``loss``: summed negative log-likelihood in nats of the
    ``n_expected_tokens`` of the first accepted answer. ``kept_tokens``: cached tokens per layer after prefill
    and eviction. Seconds are of the prompt and of the greedy answer; tasks in one batch share the time of each step.
    """

    line: int
    name: str
    task: str | None
    right: bool
    text: str
    token_ids: tuple[int, ...]
    loss: float
    n_expected_tokens: int
    n_prompt_tokens: int
    kept_tokens: tuple[int, ...]
    prompt_seconds: float
    answer_seconds: float

    def __post_init__(self) -> None:
        if min(self.n_expected_tokens, self.n_prompt_tokens, len(self.kept_tokens)) < 1:
            raise ReportError(
                f"the answer to {self.name} is empty", expected="at least one prompt token, expected token and layer"
            )

    @property
    def kept_share(self) -> float:
        """Share of the prompt's tokens that are still cached after prefill, mean over layers."""
        return self.kept_share_without(())

    def kept_share_without(self, exempt_layers: Collection[int]) -> float:
        """The same, mean over the layers that are not exempt, of which there must be at least one."""
        kept = [n for layer, n in enumerate(self.kept_tokens) if layer not in exempt_layers]
        return sum(kept) / len(kept) / self.n_prompt_tokens

    @property
    def seconds(self) -> float:
        return self.prompt_seconds + self.answer_seconds


@dataclass(frozen=True, kw_only=True)
class Score:
    """Statistics of a group of tasks. ``perplexity`` is that of the expected answers; with one task it has no interval."""

    n_tasks: int
    accuracy: Estimate
    perplexity: float
    perplexity_95: tuple[float, float] | None
    kept_share: float
    least_kept: float
    most_kept: float
    seconds_per_task: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Comparison of two engines on the same tasks.

    ``difference`` of the accuracies, and McNemar's ``verdict`` on it: ``wins`` tasks are right with the first engine only,
    ``losses`` with the other only. ``same_answers``: share of greedy answers that agree to the last token. ``agreement``: mean
    share of an answer before the first token in which the two differ. ``perplexity_ratio``: None with one task.
    """

    n_tasks: int
    difference: float
    wins: int
    losses: int
    verdict: Verdict
    same_answers: Estimate
    agreement: float
    perplexity_ratio: Estimate | None


def score_of(answers: Sequence[Answer]) -> Score:
    """The statistics of at least one answer."""
    n = len(answers)
    losses, n_tokens = [answer.loss for answer in answers], [answer.n_expected_tokens for answer in answers]
    estimate = perplexity_interval(losses, n_tokens) if n > 1 else None
    shares = [answer.kept_share for answer in answers]
    return Score(
        n_tasks=n,
        accuracy=wilson_interval(sum(answer.right for answer in answers), n),
        perplexity=math.exp(sum(losses) / sum(n_tokens)) if estimate is None else estimate.value,
        perplexity_95=None if estimate is None else (estimate.low, estimate.high),
        kept_share=sum(shares) / n,
        least_kept=min(shares),
        most_kept=max(shares),
        seconds_per_task=sum(answer.seconds for answer in answers) / n,
    )


def comparison_of(answers: Sequence[Answer], others: Sequence[Answer]) -> Comparison:
    """How ``answers`` differ from the ``others`` to the same tasks in the same order; at least one."""
    n = len(answers)
    pairs = list(zip(answers, others, strict=True))
    right, other_right = [answer.right for answer in answers], [other.right for other in others]
    losses, other_losses = [answer.loss for answer in answers], [other.loss for other in others]
    n_tokens = [answer.n_expected_tokens for answer in answers]
    return Comparison(
        n_tasks=n,
        difference=(sum(right) - sum(other_right)) / n,
        wins=sum(answer.right and not other.right for answer, other in pairs),
        losses=sum(other.right and not answer.right for answer, other in pairs),
        verdict=compare_shares(right, other_right),
        same_answers=wilson_interval(sum(answer.token_ids == other.token_ids for answer, other in pairs), n),
        agreement=sum(agreement(answer.token_ids, other.token_ids) for answer, other in pairs) / n,
        perplexity_ratio=perplexity_ratio(losses, other_losses, n_tokens) if n > 1 else None,
    )


def agreement(tokens: Sequence[int], others: Sequence[int]) -> float:
    """The share of the longer of two answers before the first token in which they differ; 1 for two empty ones."""
    n_same = next((i for i, (a, b) in enumerate(zip(tokens, others, strict=False)) if a != b), min(len(tokens), len(others)))
    longest = max(len(tokens), len(others))
    return n_same / longest if longest else 1.0


def groups_of(answers: Sequence[Answer]) -> dict[str, list[int]]:
    """Indices of the answers of each group of tasks, in the order of first appearance; empty if no task names one."""
    if all(answer.task is None for answer in answers):
        return {}
    groups: dict[str, list[int]] = {}
    for index, answer in enumerate(answers):
        groups.setdefault(answer.task or UNNAMED, []).append(index)
    return groups


def answer_losses(logits_TV: Floats, fed: Sequence[int]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """For each token of ``fed``: whether logits [T, V] rank it first, and its negative log-likelihood in nats, both [T]."""
    tokens_T = np.asarray(fed)
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(axis=1, keepdims=True)
    picked_T = shifted_TV[np.arange(len(tokens_T)), tokens_T]
    return logits_TV.argmax(axis=1) == tokens_T, np.log(np.exp(shifted_TV).sum(axis=1)) - picked_T
