"""KV heads with budgets of their own in the report of a real model: measured as other policies are, and as engines run them."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import numpy as np
import pytest

from benchmarks.quality.harness import Plan
from benchmarks.quality.real.answering import PAGE_SIZE, Answerer, Question
from benchmarks.quality.real.asking import Asker
from benchmarks.quality.real.contenders import contenders
from benchmarks.quality.real.conversations import MODES, Talk, talked
from benchmarks.quality.recipes import Predicted, Recipes, calibrated_head_recipes, recipe_kind
from benchmarks.quality.store import Store
from tests.engines import HEAD_SHARES, random_ids
from trt_kv.cache_layers import cache_config, each_repeated
from trt_kv.calibration.lukv import Usefulness, UsefulnessOf
from trt_kv.model_config import ModelConfig
from trt_kv.policies import policy_names, policy_without_floor
from trt_kv.policy import Policy
from trt_kv.program import PHASES, Program, program_of_model
from trt_kv.recipe import RecipeModel
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.engine import Engine
from trt_kv.surrogate import Predictor

pytestmark = pytest.mark.usefixtures("one_thread")

APART = tuple(share for shares in HEAD_SHARES for share in shares)
SHARES = (0.6, 0.3, 0.9)
LUKV = policy_without_floor("lukv")
WINDOW = {"window": 16, "pooling": 3}


def dense_of(engine: Engine) -> DenseExecutor:
    steps = engine.runner._executor
    assert isinstance(steps, SplitStepExecutor)
    return steps.dense


@pytest.fixture(scope="module")
def answerer(small_engine: Engine) -> Answerer:
    return Answerer(dense_of(small_engine), small_engine.manifest.config, longest=250)


@pytest.fixture(scope="module")
def question(small_engine: Engine) -> Question:
    prompt, given = random_ids(small_engine, 200, seed=1), random_ids(small_engine, 3, seed=2)
    return Question(prompt=tuple(prompt), given=tuple(given), n_new=12, ends=lambda _: False, fact=tuple(range(90, 110)))


def by_head(shares: Sequence[float], **changes: object) -> Plan:
    return Plan(policy=dataclasses.replace(LUKV, **WINDOW, **changes), kept_shares=tuple(shares))  # type: ignore[arg-type]


def together(plan: Plan, shares: Sequence[float]) -> Plan:
    return Plan(policy=dataclasses.replace(plan.policy, heads="each"), kept_shares=tuple(shares))


@pytest.mark.parametrize("decode", ["keep", "row", "rank"])
def test_heads_of_equal_shares_answer_as_heads_that_share_pages(answerer: Answerer, question: Question, decode: str) -> None:
    """Tokens, and every number of the report, beside other policies in any order."""
    own = by_head(each_repeated(SHARES, 2), decode=decode)
    full = Plan(policy=policy_without_floor("full"))
    whole, alone = by_head([1.0] * 6), answerer.answers(question, [own])
    found = answerer.answers(question, [own, full, together(own, SHARES), whole])
    assert found[0] == found[2] == alone[0]
    assert found[0].kept == pytest.approx(0.6, abs=0.01)
    assert found[0].fact_kept is not None
    assert 0.0 < found[0].fact_kept < 1.0
    assert found[1] == found[3] == answerer.full(question)
    assert found[0].tokens != found[1].tokens, "the eviction must show"
    for harness in (answerer.harness, answerer.harness_by_head):
        harness.pool.check_integrity([])


def test_losses_are_those_of_heads_that_share_pages(answerer: Answerer, question: Question) -> None:
    own = by_head(each_repeated(SHARES, 2))
    plans = [Plan(policy=policy_without_floor("full")), own, together(own, SHARES), by_head([1.0] * 6)]
    full, apart, shared, whole = answerer.losses(question.prompt, [*question.given, 5, 6, 7], plans)
    assert apart == pytest.approx(shared, rel=1e-6)
    assert whole == pytest.approx(full, rel=1e-6)
    assert apart != pytest.approx(full, rel=1e-3)


@pytest.mark.parametrize("decode", ["row", "rank"])
def test_heads_of_unequal_shares_answer_as_the_runtime_of_engines(
    answerer: Answerer, question: Question, small_engine: Engine, decode: str
) -> None:
    plan = by_head(APART, decode=decode)
    (answered,) = answerer.answers(question, [plan])
    config = small_engine.manifest.config
    cache = cache_config(config, plan.policy)
    pool = HostKvPool(n_pages=200, page_size=PAGE_SIZE, n_kv_heads=cache.n_kv_heads, head_size=cache.head_dim)
    runner = host_runner(dense_of(small_engine), pool, programs(config, plan), decode=decode)
    sequence = runner.new_sequence()
    logits_V = runner.prefill(sequence, question.prompt)
    n_kept, n_pages = sequence.kv_len.copy(), len(sequence.pages)
    facts = [np.isin(question.fact, runner.kept_positions(sequence, layer)).mean() for layer in range(6)]
    said: list[int] = []
    for at in range(len(question.given) + question.n_new):
        token = question.given[at] if at < len(question.given) else int(logits_V.argmax())
        said += [] if at < len(question.given) else [token]
        logits_V = runner.decode([sequence], [token])[0]
    assert answered.tokens == tuple(said)
    assert answered.kept == pytest.approx(n_kept.mean() / len(question.prompt))
    assert answered.fact_kept == pytest.approx(np.mean(facts))
    assert answered.kv_bytes == n_pages * answerer.harness_by_head.pool.page_bytes
    assert len(set(n_kept.tolist())) == 6, "each head has a length of its own"


def test_a_page_of_one_head_has_its_part_of_the_bytes(answerer: Answerer) -> None:
    assert answerer.harness_by_head.pool.page_bytes * 2 == answerer.harness.pool.page_bytes


@pytest.mark.parametrize("mode", MODES)
def test_conversations_are_those_of_heads_that_share_pages(small_engine: Engine, mode: str) -> None:
    asked = Talk(
        document=tuple(random_ids(small_engine, 150, seed=4)),
        questions=tuple((tuple(random_ids(small_engine, 9, seed=seed)), "1") for seed in (5, 6)),
    )
    config, asker = small_engine.manifest.config, Asker(small_engine.tokenizer, [])
    own = by_head(each_repeated(SHARES, 2))
    found = [
        talked(dense_of(small_engine), config, asker, plan, mode, asked)
        for plan in (own, together(own, SHARES), by_head(APART))
    ]
    assert found[0] == found[1]
    assert found[0].held[-1] == pytest.approx(0.6, abs=0.03)
    assert found[2].held[-1] == pytest.approx(np.mean(APART), abs=0.03)


def test_recipes_of_heads_are_for_every_layer_of_the_cache() -> None:
    draw = np.random.default_rng(0)
    found = [Usefulness(ranking=draw.random((3, 2, 60)), use=draw.random((3, 2, 60))) for _ in range(2)]
    prompts = [[Random(n).randrange(9) for _ in range(60)] for n in range(2)]
    asked: list[Policy] = []

    def usefulness_for(policy: Policy) -> UsefulnessOf:
        asked.append(policy)
        return lambda ids: found[prompts.index(list(ids))]

    model = RecipeModel(name="a model", digest="0", n_layers=3)
    recipes = calibrated_head_recipes(prompts, (0.5, 0.125), [LUKV, LUKV], usefulness_for, model, seed=0)
    assert asked == [LUKV], "prompts are continued once for all budgets and policies of the same ranking"
    for budget in (0.5, 0.125):
        kept = recipes.kept(recipe_kind(LUKV), budget)
        assert len(kept) == 6
        assert np.mean(kept) == pytest.approx(budget, abs=0.02)
    assert min(recipes.facts[0].kept) < max(recipes.facts[0].kept)
    assert recipes.facts[0].mass > recipes.facts[1].mass > 0.0
    shared = dataclasses.replace(LUKV, heads="each")
    assert recipe_kind(LUKV).name != recipe_kind(shared).name, "both may be in one report"


def test_stored_recipes_are_read_back_with_what_predicts_and_from_before_there_was_that(tmp_path: Path) -> None:
    store = Store(folder=tmp_path, conditions={})
    predicted = Predicted(budget=0.5, predictors=(Predictor(weights=(0.25, -1.0), frequencies=(1.0,), threshold=-0.5),))
    recipes = Recipes(facts=(), predicted=(predicted,))
    store.get_or_measure("recipes", Recipes, lambda: recipes)
    assert store.get_or_measure("recipes", Recipes, lambda: pytest.fail("measured again")) == recipes
    assert recipes.predictors(0.5) == predicted.predictors
    document = json.loads((tmp_path / "recipes.json").read_text())
    del document["part"]["predicted"]
    (tmp_path / "recipes.json").write_text(json.dumps(document))
    assert store.get_or_measure("recipes", Recipes, lambda: pytest.fail("measured again")) == Recipes(facts=())


def test_every_preset_is_in_the_report_of_a_real_model() -> None:
    known = [contender.facts.name for contender in contenders()]
    assert sorted(known) == sorted(policy_names())


def programs(config: ModelConfig, plan: Plan) -> dict[str, Program]:
    return {
        phase: program_of_model(config, plan.policy, phase=phase, page_size=PAGE_SIZE, kept_shares=plan.kept_shares)
        for phase in PHASES
    }
