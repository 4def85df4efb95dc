"""Estimates with 95 % intervals, and whether two variants differ on the same documents.

D documents. The documents, not their tokens, are the sample: tokens of one document are not independent.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trt_kv.errors import UsageError

Z_95 = 1.959963984540054
SIGNIFICANCE = 0.05
FEWEST_DOCUMENTS = 6
"""With fewer, no difference can be significant: 2 / 2^5 is above the level of significance."""
Verdict = Literal["better", "worse", "no clear difference"]


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


def wilson_interval(n_right: int, n: int) -> Estimate:
    """A share of ``n`` trials with Wilson's score interval (Wilson 1927). ``UsageError`` unless 0 <= n_right <= n, n >= 1."""
    if not 0 <= n_right <= n or n < 1:
        raise UsageError("invalid numbers for a share", got=f"{n_right} of {n}", expected="0 <= right <= n, n >= 1")
    share, z2 = n_right / n, Z_95**2
    center = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Estimate(value=share, low=min(max(0.0, center - half), share), high=max(min(1.0, center + half), share))


def perplexity_interval(losses_D: Sequence[float], n_tokens_D: Sequence[int]) -> Estimate:
    """exp of the mean loss per token, its interval from the normal approximation of that mean over documents, cut at 1.

    ``losses_D``: summed negative log-likelihood of each document's answer in nats; ``n_tokens_D``: the tokens summed over.
    """
    mean, half = _mean_per_token(losses_D, n_tokens_D)
    return Estimate(value=math.exp(mean), low=math.exp(max(0.0, mean - half)), high=math.exp(mean + half))


def perplexity_ratio(losses_D: Sequence[float], other_D: Sequence[float], n_tokens_D: Sequence[int]) -> Estimate:
    """The first perplexity divided by the second on the same documents, with a paired interval; otherwise as above."""
    mean, half = _mean_per_token(np.subtract(losses_D, other_D).tolist(), n_tokens_D)
    return Estimate(value=math.exp(mean), low=math.exp(mean - half), high=math.exp(mean + half))


def token_share_interval(n_right_D: Sequence[int], n_tokens_D: Sequence[int]) -> Estimate:
    """The share of all tokens that are right, its interval from the normal approximation over documents, within [0, 1]."""
    share, half = _mean_per_token(n_right_D, n_tokens_D)
    return Estimate(value=share, low=max(0.0, share - half), high=min(1.0, share + half))


def mean_interval(values_D: Sequence[float]) -> Estimate:
    """The mean over documents with the interval of its normal approximation."""
    mean, half = _mean_per_token(values_D, [1] * len(values_D))
    return Estimate(value=mean, low=mean - half, high=mean + half)


def compare_shares(right_D: Sequence[bool], other_D: Sequence[bool]) -> Verdict:
    """Whether the first of two variants is right more often on the same documents: McNemar's exact test, two-sided."""
    wins = sum(a and not b for a, b in zip(right_D, other_D, strict=True))
    losses = sum(b and not a for a, b in zip(right_D, other_D, strict=True))
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    if min(1.0, 2 * tail) >= SIGNIFICANCE:
        return "no clear difference"
    return "better" if wins > losses else "worse"


def compare_losses(losses_D: Sequence[float], other_D: Sequence[float]) -> Verdict:
    """Whether the first of two variants has the lower loss on the same documents: two-sided test of the mean difference."""
    difference_D = np.asarray(losses_D, np.float64) - np.asarray(other_D, np.float64)
    _check_documents(len(difference_D))
    half = Z_95 * float(difference_D.std(ddof=1)) / math.sqrt(len(difference_D))
    mean = float(difference_D.mean())
    if abs(mean) <= half:
        return "no clear difference"
    return "better" if mean < 0.0 else "worse"


def _mean_per_token(losses_D: Sequence[float], n_tokens_D: Sequence[int]) -> tuple[float, float]:
    """Mean loss per token, and half the width of its 95 % interval (ratio estimator, linearised)."""
    losses, tokens = np.asarray(losses_D, np.float64), np.asarray(n_tokens_D, np.float64)
    _check_documents(len(losses))
    mean = float(losses.sum() / tokens.sum())
    residuals_D = (losses - mean * tokens) / tokens.mean()
    return mean, Z_95 * math.sqrt(float((residuals_D**2).sum()) / (len(losses) - 1) / len(losses))


def _check_documents(n: int) -> None:
    if n < 2:
        raise UsageError("an interval needs several documents", got=n, expected="at least 2 documents")
