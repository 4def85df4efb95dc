"""What evaluation promises: equal totals for every variant, tasks cut where they should be, honest intervals and verdicts."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trt_kv.calibration.evaluation import FULL, VARIANTS, Encode, Variant, answer_losses, case_from_task, layer_budgets
from trt_kv.calibration.evaluation_findings import COMPARISONS, describe, signs
from trt_kv.calibration.evaluation_statistics import (
    Verdict,
    compare_losses,
    compare_shares,
    perplexity_interval,
    perplexity_ratio,
    wilson_interval,
)
from trt_kv.calibration.prefixkv import calibrate_prefixkv, online_budget
from trt_kv.calibration.synthetic_english import VOCABULARY
from trt_kv.calibration.tasks import REGIONS, evaluation_tasks, plain_text_tasks
from trt_kv.errors import UsageError
from trt_kv.recipe import Recipe, RecipeModel, RecipeScore

N_LAYERS = 3
WORD_IDS = {word: index for index, word in enumerate(VOCABULARY)}


def _encode(text: str) -> list[int]:
    return [WORD_IDS["<bos>"], *(WORD_IDS[word] for word in text.split())]


def _importance(n_tokens: int, *, concentration: float = 3.0, seed: int = 0) -> np.ndarray:
    """Scores [L, N] that are more concentrated from layer to layer."""
    drawn = np.random.default_rng(seed).random((N_LAYERS, n_tokens)) + 1e-3
    scores: np.ndarray = drawn ** (concentration * np.arange(1, N_LAYERS + 1)[:, None])
    return scores


def _recipe(score: str, share: float, n_tokens: int) -> Recipe:
    return calibrate_prefixkv(
        [list(range(n_tokens))],
        lambda ids: _importance(len(ids), concentration=2.0 if score == "mass" else 4.0),
        budget=share,
        score=RecipeScore(name=score, window=32 if score == "window" else None),
        model=RecipeModel(name="test", digest="sha256:0", n_layers=N_LAYERS),
        source="made for a test",
    )


@given(share=st.sampled_from([0.1, 0.3, 0.5, 0.9]), n_tokens=st.integers(100, 400))
def test_every_variant_of_a_kept_share_keeps_the_same_number_of_tokens(share: float, n_tokens: int) -> None:
    recipes = {score: _recipe(score, share, n_tokens) for score in ("mass", "window")}
    importance = {score: _importance(n_tokens, seed=seed) for seed, score in enumerate(recipes)}
    for variant in VARIANTS:
        budgets = layer_budgets(variant, share, n_tokens=n_tokens, n_layers=N_LAYERS, recipes=recipes, importance=importance)
        assert abs(sum(budgets.tokens) - share * n_tokens * N_LAYERS) <= N_LAYERS, variant.name
        assert all(0.0 < growth <= 1.0 for growth in budgets.growth)


def test_budgets_come_from_the_recipe_or_the_search_that_the_variant_names() -> None:
    recipes = {score: _recipe(score, 0.3, 200) for score in ("mass", "window")}
    importance = {score: _importance(200, seed=seed) for seed, score in enumerate(recipes)}

    def tokens(name: str) -> tuple[int, ...]:
        (variant,) = [variant for variant in (FULL, *VARIANTS) if variant.name == name]
        return layer_budgets(variant, 0.3, n_tokens=200, n_layers=N_LAYERS, recipes=recipes, importance=importance).tokens

    assert tokens("prefixkv") == tokens("random") == tokens("mass-recent") == tuple(recipes["mass"].kept_tokens(200))
    assert tokens("window") == tuple(recipes["window"].kept_tokens(200)) != tokens("prefixkv")
    assert tokens("mass-online") == tuple(online_budget(importance["mass"], 0.3))
    assert tokens("window-online") == tuple(online_budget(importance["window"], 0.3))
    assert tokens("mass-uniform") == tokens("window-uniform") == tokens("recency") == (60, 60, 60)
    assert tokens("full") == (200, 200, 200)


def test_a_recipe_of_another_budget_is_refused() -> None:
    recipes = {"mass": _recipe("mass", 0.3, 200)}
    with pytest.raises(UsageError, match="another budget"):
        layer_budgets(VARIANTS[0], 0.4, n_tokens=200, n_layers=N_LAYERS, recipes=recipes, importance={})


def test_variants_and_comparisons_have_names_of_their_own_and_differ_in_one_choice() -> None:
    named = {variant.name: variant for variant in (FULL, *VARIANTS)}
    assert len(named) == len({variant.label for variant in named.values()}) == 1 + len(VARIANTS)

    def choices(variant: Variant) -> tuple[object, ...]:
        return variant.score, variant.allocation, variant.recent

    for comparison in COMPARISONS:
        pair = zip(choices(named[comparison.variant]), choices(named[comparison.other]), strict=True)
        assert sum(a != b for a, b in pair) == 1, comparison


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("question_known", [True, False])
def test_a_case_knows_where_the_asked_fact_and_the_question_stand(region: str, question_known: bool) -> None:
    for task in evaluation_tasks(5, context_length=300, n_facts=6, distance=region):  # type: ignore[arg-type]
        case = case_from_task(task, _encode, question_known=question_known)
        assert tuple(case.prompt[i] for i in case.fact) == case.answer
        assert list(case.prompt + case.fed) == _encode(f"{task.prompt} {task.answer}")
        asked = tuple(case.prompt[i] for i in case.question) + case.given
        assert asked[0] == WORD_IDS["question"]
        assert asked[-2:] == (WORD_IDS["answer"], WORD_IDS[":"])
        assert bool(case.given) != question_known
        assert case.first_counted == (1 if question_known else len(case.given))


def test_plain_text_has_neither_fact_nor_question() -> None:
    (task,) = plain_text_tasks(1, context_length=200, answer_length=20)
    case = case_from_task(task, _encode)
    assert not case.fact
    assert not case.question
    assert not case.given
    assert len(case.answer) == 20


@pytest.mark.parametrize("broken", [lambda text: [*_encode(text), 5], lambda text: [1, *_encode(text)]])
def test_a_tokenizer_of_another_language_is_refused(broken: Encode) -> None:
    (task,) = evaluation_tasks(1, context_length=200, n_facts=2)
    with pytest.raises(UsageError, match="tokenizer"):
        case_from_task(task, broken)


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


def test_comparisons_of_losses_rarely_see_what_is_not_there_and_see_what_is() -> None:
    rng = np.random.default_rng(0)
    drawn = [(rng.normal(3.0, 1.0, 50), rng.normal(0.0, 0.1, 50)) for _ in range(200)]
    found = [compare_losses((losses + noise).tolist(), losses.tolist()) for losses, noise in drawn]
    assert found.count("no clear difference") >= 180
    assert all(compare_losses((losses + noise - 0.1).tolist(), losses.tolist()) == "better" for losses, noise in drawn)
    assert compare_losses([3.0, 4.0], [3.0, 4.0]) == "no clear difference"


def test_verdicts_are_told_in_ranges_of_kept_shares() -> None:
    shares = [0.1, 0.2, 0.3, 0.4, 0.5]
    better: Verdict = "better"
    nothing: Verdict = "no clear difference"
    assert describe(dict.fromkeys(shares, better)) == "better at every kept share"
    assert describe(dict.fromkeys(shares, nothing)) == "no clear difference at any kept share"
    found: list[Verdict] = ["better", "better", "no clear difference", "better", "worse"]
    assert (
        describe(dict(zip(shares, found, strict=True))) == "better at 10–20, 40 %, worse at 50 %, no clear difference at 30 %"
    )
    assert signs(dict(zip(shares, found, strict=True))) == "++.+-"
