"""What the report on host-resident policies promises: as engines do it, robust directions, exact limits, true counts."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks.quality.cases import Case, case_from_task
from benchmarks.quality.harness import Outcome, Plan
from benchmarks.quality.plans import FULL_HOST_PLANS, FULL_SETTINGS
from benchmarks.quality.recall.harness import Moved, RecallHarness, recall_harness_from_engine
from benchmarks.quality.recall.measure import ADAPTIVE
from benchmarks.quality.recall.policies import host_contenders
from benchmarks.quality.recall.steps import Choice, Movement
from benchmarks.quality.recall.tables import COMPARISONS, SYNCHRONOUS, UNCORRECTED
from trt_kv.calibration.tasks import copy_tasks, evaluation_tasks
from trt_kv.manifest import load_manifest
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.program import PHASES, program_of
from trt_kv.runtime.backends.host.onnxruntime_segments import OnnxRuntimeExecutor
from trt_kv.runtime.backends.host.recall.background import ThreadedCopies
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.store import RamTier
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.model_runner import ModelRunner

pytestmark = [pytest.mark.early, pytest.mark.slow]

BY_NAME = {contender.name: contender.policy for contender in host_contenders()}
FULL = Plan(policy=policy_from_name("full"))
KEPT = 0.15
PAGE = 8
N_DECODED = 20


@pytest.fixture(scope="module")
def harness(full_folder: Path) -> RecallHarness:
    manifest = load_manifest(full_folder)
    return recall_harness_from_engine(full_folder, manifest, BY_NAME[ADAPTIVE], page_size=PAGE, context_length=600, n_forks=8)


@pytest.fixture(scope="module")
def cases(full_folder: Path) -> list[Case]:
    tokenizer = Tokenizer.from_file(str(full_folder / "tokenizer.json"))
    tasks = [*evaluation_tasks(1, context_length=420, n_facts=6), *copy_tasks(1, context_length=530)]
    return [case_from_task(task, lambda text: list(tokenizer.encode(text).ids)) for task in tasks]


def _policy(name: str) -> Policy:
    policy = BY_NAME[name]
    return policy if policy.budget == "unimetric" else dataclasses.replace(policy, kept=KEPT)


def _run(harness: RecallHarness, case: Case, policies: Sequence[Policy]) -> list[tuple[Outcome, Moved]]:
    return harness.run(case, [Plan(policy=policy) for policy in policies])


def _runner(folder: Path, policy: Policy, *, streams: bool = False) -> ModelRunner:
    """The runtime with the policy's own programs; ``streams``: with the cache really on the host."""
    manifest = load_manifest(folder)
    config = manifest.config
    programs = {
        phase: program_of(policy, phase=phase, n_layers=config.n_layers, scale=config.scale, page_size=PAGE) for phase in PHASES
    }
    sizes: dict[str, Any] = {"n_pages": 1000, "page_size": PAGE, "n_kv_heads": config.n_kv_heads, "head_size": config.head_dim}
    pool = HostKvPool(**sizes, n_query_heads=0 if streams else config.n_heads)
    executor = OnnxRuntimeExecutor(folder / "graphs", manifest.segments, manifest.attention_ports)
    recall = None
    if streams:
        recall = StreamedRecall(RamTier(**sizes), pool, ThreadedCopies(), n_layers=config.n_layers, finds_budgets=False)
    return host_runner(executor, pool, programs, decode="keep", recall=recall)


def _generated(folder: Path, policy: Policy, prompt: Sequence[int]) -> tuple[int, ...]:
    """What the runtime generates greedily."""
    runner = _runner(folder, policy)
    sequence = runner.new_sequence()
    made = [int(runner.prefill(sequence, prompt).argmax())]
    while len(made) < N_DECODED:
        made.append(int(runner.decode([sequence], made[-1:])[0].argmax()))
    return tuple(made)


@pytest.mark.parametrize(
    "name", ["freekv", UNCORRECTED, "quest", "arkvale", "bestkey", ADAPTIVE, "freekv-deviation", "quest-exempt"]
)
def test_a_policy_answers_as_the_runtime_does_with_it(
    name: str, harness: RecallHarness, cases: list[Case], full_folder: Path
) -> None:
    """In one batch with others, from a prefill that it shares with them."""
    policy = _policy(name)
    for case in cases:
        made = _generated(full_folder, policy, case.prompt)
        others = [_policy("arkvale"), policy, _policy(ADAPTIVE), policy]
        outcomes = [outcome for outcome, _ in _run(harness, dataclasses.replace(case, answer=made), others)]
        assert outcomes[1].tokens == outcomes[3].tokens == made
        assert outcomes[1].right
    harness.pool.check_integrity([])


@pytest.mark.parametrize("name", ["freekv", UNCORRECTED, "quest"])
def test_the_runtime_corrects_as_often_and_moves_no_more(
    name: str, harness: RecallHarness, cases: list[Case], full_folder: Path
) -> None:
    """Its working sets have some more slots, in which pages stay that are chosen again later."""
    policy, case = _policy(name), cases[1]
    ((_, moved),) = _run(harness, case, [policy])
    runner = _runner(full_folder, policy, streams=True)
    assert isinstance(runner.tiers, StreamedRecall)
    sequence = runner.new_sequence()
    runner.prefill(sequence, case.prompt)
    n_steps, counts = len(case.fed) - 1, runner.tiers.statistics
    runner.decode([sequence], case.fed[:1])
    first = counts.moved_ahead_L.sum() if policy.tau <= 1.0 else counts.moved_at_once_L.sum()
    for token in case.fed[1:-1]:
        runner.decode([sequence], [token])
    np.testing.assert_allclose(counts.corrected_LK / n_steps, moved.corrected_LK, atol=1.5 / n_steps)
    ahead, late = int(counts.moved_ahead_L.sum()), int(counts.moved_at_once_L.sum())
    moves = ahead + late - first
    at_most = moved.ahead * (n_steps - 1) + moved.late * (n_steps - (policy.tau > 1.0))
    assert 0.5 * at_most < moves <= at_most + 1
    sequence.release()
    runner.tiers.close()


def test_without_speculation_a_step_chooses_as_quest_does(harness: RecallHarness, cases: list[Case]) -> None:
    for case in cases:
        quest = dataclasses.replace(_policy("quest"), group_pooling="mean_softmax")
        (freekv, moved), (alike, moved_alike) = _run(harness, case, [_policy(SYNCHRONOUS), quest])
        assert (freekv, moved) == (alike, moved_alike)
        assert moved.corrected_heads == moved.corrected_layer_steps == 1.0
        assert moved.ahead == 0.0
        assert moved.late > 0.0


def test_without_correction_nothing_is_waited_for(harness: RecallHarness, cases: list[Case]) -> None:
    ((_, moved),) = _run(harness, cases[1], [_policy(UNCORRECTED)])
    assert moved.late == moved.corrected_heads == moved.corrected_layer_steps == 0.0
    assert moved.ahead > 0.0


def test_a_budget_of_the_whole_context_is_the_full_cache(harness: RecallHarness, cases: list[Case]) -> None:
    for case in cases:
        everything = [
            dataclasses.replace(BY_NAME[name], budget="constant", kept=1.0, tokens=len(case.prompt) + 200)
            for name in ("freekv", UNCORRECTED, "arkvale")
        ]
        (full, _), *found = harness.run(case, [FULL, *(Plan(policy=policy) for policy in everything)])
        for outcome, _ in found:
            assert outcome.tokens == full.tokens
            assert outcome.loss == pytest.approx(full.loss, abs=1e-4)
            assert outcome.kept_by_layer == full.kept_by_layer
        assert [moved.late for _, moved in found[:2]] == [0.0, 0.0], "another query chooses the same pages: all of them"


def test_pages_are_counted_once_when_they_are_missing() -> None:
    """Two KV heads of one layer, three steps; the second is corrected for its first head."""
    movement = Movement(1, 2)

    def step(ahead: list[list[int]], chosen: list[list[int]], drifted: list[bool]) -> None:
        choice = Choice(
            ahead_KC=np.array(ahead),
            chosen_KC=np.array(chosen),
            cosine_K=np.array([0.5, 0.25]),
            drifted_K=np.array(drifted),
            kept=np.array([0, 8, 9]),
            n_pages=10,
            looks_ahead=True,
        )
        movement.add(0, choice, 98, 10)
        movement.finish_step(1)

    step([[1, 2], [3, 4]], [[1, 2], [3, 4]], [False, False])
    assert (movement.ahead, movement.late) == (0, 0)
    step([[1, 5], [3, 4]], [[5, 6], [3, 4]], [True, False])
    assert (movement.ahead, movement.late) == (1, 1), "5 was recalled ahead; 6 had to be waited for"
    step([[5, 6], [1, 2]], [[5, 6], [1, 2]], [False, False])
    assert (movement.ahead, movement.late) == (3, 1)
    assert (movement.common, movement.comparable) == (2 + 2, 8)
    assert movement.corrected_LK.tolist() == [[1, 0]]
    assert movement.attended_L.tolist() == [3 * (5 * 10 - 2)]
    assert movement.attended_by_position.tolist() == [6, 2, 2, 2, 2, 2, 2, 0, 6, 6]
    assert movement.cosine_LK.tolist() == [[1.5, 0.75]]


def test_names_are_known_and_plans_have_documents() -> None:
    known = host_contenders()
    assert len({contender.name for contender in known}) == len(known) == len({contender.label for contender in known})
    assert {name for comparison in COMPARISONS for name in (comparison.policy, comparison.other)} <= set(BY_NAME)
    for plan in FULL_HOST_PLANS:
        assert set(plan.budgets) <= set(FULL_SETTINGS.at(plan.context_length).budgets)
