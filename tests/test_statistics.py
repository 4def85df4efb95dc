"""What statistics of answers promise: honest intervals and verdicts, on documents as the sample."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_kv.calibration.answers import answer_losses
from trt_kv.calibration.statistics import (
    FEWEST_DOCUMENTS,
    Verdict,
    compare_losses,
    compare_shares,
    mean_interval,
    perplexity_interval,
    perplexity_ratio,
    token_share_interval,
    wilson_interval,
)
from trt_kv.errors import UsageError


def test_losses_are_those_of_a_softmax() -> None:
    logits = np.random.default_rng(0).normal(0.0, 30.0, (7, 11)).astype(np.float32)
    fed = [3, 1, 4, 1, 5, 9, int(logits[6].argmax())]
    first, losses = answer_losses(logits, fed)
    for t, token in enumerate(fed):
        exact = -math.log(math.exp(float(logits[t, token]) - float(logits[t].max())) or 5e-324) + math.log(
            sum(math.exp(float(x) - float(logits[t].max())) for x in logits[t])
        )
        assert losses[t] == pytest.approx(exact, rel=1e-6)
        assert first[t] == (int(logits[t].argmax()) == token)
    assert first[6]


def test_wilsons_interval_is_the_published_one() -> None:
    """Wilson (1927) for 81 of 263, as in Newcombe (1998), table I, method 3."""
    interval = wilson_interval(81, 263)
    assert (round(interval.low, 4), round(interval.high, 4)) == (0.2553, 0.3662)


@given(n=st.integers(1, 500), data=st.data())
def test_wilsons_interval_holds_its_share_and_narrows_with_trials(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    interval, wider = wilson_interval(10 * right, 10 * n), wilson_interval(right, n)
    assert 0.0 <= wider.low <= interval.low <= interval.value <= interval.high <= wider.high <= 1.0
    assert wider.high > wider.low


def test_impossible_shares_and_single_documents_are_refused() -> None:
    for right, n in ((1, 0), (-1, 3), (4, 3)):
        with pytest.raises(UsageError, match="share"):
            wilson_interval(right, n)
    for refused in (lambda: perplexity_interval([1.0], [2]), lambda: compare_losses([1.0], [2.0])):
        with pytest.raises(UsageError, match="at least 2"):
            refused()


def test_perplexity_weighs_tokens_and_its_interval_covers_the_truth() -> None:
    assert perplexity_interval([1.0, 3.0], [1, 3]).value == pytest.approx(math.e)
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        tokens = rng.integers(4, 9, 60)
        losses = [float(rng.exponential(0.5, n).sum()) for n in tokens]
        interval = perplexity_interval(losses, tokens.tolist())
        covered += interval.low <= math.exp(0.5) <= interval.high
    assert 0.9 <= covered / 300 <= 0.99


def test_in_a_ratio_of_perplexities_the_difficulty_of_documents_cancels() -> None:
    rng = np.random.default_rng(0)
    tokens = [10] * 40
    losses = rng.uniform(5.0, 50.0, 40)
    worse = losses + rng.uniform(0.9, 1.1, 40)
    ratio = perplexity_ratio(worse.tolist(), losses.tolist(), tokens)
    assert ratio.value == pytest.approx(
        perplexity_interval(worse.tolist(), tokens).value / perplexity_interval(losses.tolist(), tokens).value
    )
    assert 1.09 < ratio.low < ratio.value < ratio.high < 1.12
    same = perplexity_ratio(losses.tolist(), losses.tolist(), tokens)
    assert (same.low, same.value, same.high) == (1.0, 1.0, 1.0)


def test_a_share_of_tokens_weighs_tokens_and_stays_between_none_and_all() -> None:
    interval = token_share_interval([4, 0, 6], [4, 2, 6])
    assert interval.value == pytest.approx(10 / 12)
    assert interval.high == 1.0
    assert 0.0 <= interval.low < interval.value
    all_right = token_share_interval([4, 2], [4, 2])
    assert (all_right.low, all_right.value, all_right.high) == (1.0, 1.0, 1.0)


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    values = [0.2, 0.4, 0.6, 0.9]
    half = 1.959964 * float(np.std(values, ddof=1)) / 2
    interval = mean_interval(values)
    assert (interval.low, interval.value, interval.high) == pytest.approx((0.525 - half, 0.525, 0.525 + half))


@given(pairs=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80))
def test_comparisons_of_answers_turn_around_with_their_sides(pairs: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in pairs], [b for _, b in pairs]
    turned: dict[Verdict, Verdict] = {"better": "worse", "worse": "better", "no clear difference": "no clear difference"}
    assert compare_shares(second, first) == turned[compare_shares(first, second)]
    assert compare_shares(first, first) == "no clear difference"


def test_answers_differ_clearly_from_six_wins_without_a_loss_on() -> None:
    """McNemar, exact and two-sided: 2 / 2^5 > 5 % >= 2 / 2^6."""
    assert compare_shares([True] * 5 + [False] * 9, [False] * 14) == "no clear difference"
    assert compare_shares([True] * 6 + [False] * 9, [False] * 15) == "better"
    assert FEWEST_DOCUMENTS == 6


def test_comparisons_of_losses_rarely_see_what_is_not_there_and_see_what_is() -> None:
    rng = np.random.default_rng(0)
    drawn = [(rng.normal(3.0, 1.0, 50), rng.normal(0.0, 0.1, 50)) for _ in range(200)]
    found = [compare_losses((losses + noise).tolist(), losses.tolist()) for losses, noise in drawn]
    assert found.count("no clear difference") >= 180
    assert all(compare_losses((losses + noise - 0.1).tolist(), losses.tolist()) == "better" for losses, noise in drawn)
    assert compare_losses([3.0, 4.0], [3.0, 4.0]) == "no clear difference"
