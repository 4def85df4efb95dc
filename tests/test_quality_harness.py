"""What the report's harness promises: under every policy exactly what an engine built with it does, and no memory lost."""

import dataclasses
import itertools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from benchmarks.quality.cases import Case, case_from_task
from benchmarks.quality.harness import Harness, Plan, harness_from_engine
from benchmarks.quality.policies import contenders
from tests.engines import SHARES
from trt_kv.calibration.tasks import copy_tasks, distractor_tasks, evaluation_tasks, plain_text_tasks
from trt_kv.errors import UsageError
from trt_kv.manifest import load_manifest
from trt_kv.opspec import OP_VERSION
from trt_kv.plugins.paging import gather_kv, pages_of
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.program import PHASES, program_of
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.engine import Engine

pytestmark = pytest.mark.slow

BY_NAME = {contender.name: contender.policy for contender in contenders()}
KEPT = 0.3
COMPARED = ["refreekv", "snapkv", "h2o", "streamingllm", "pyramidkv", "random", "mean-uniform", "refreekv-attention", "reach"]
N_DECODED = 24


@pytest.fixture(scope="module")
def harness(full_folder: Path) -> Harness:
    manifest = load_manifest(full_folder)
    return harness_from_engine(full_folder, manifest, context_length=1100, n_forks=20)


@pytest.fixture(scope="module")
def copied_folder(full_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This module's own copy, to be linked to: onnx reads no weights that have several names, and other tests read those."""
    folder = tmp_path_factory.mktemp("copied") / "full"
    shutil.copytree(full_folder, folder)
    return folder


def _plan(name: str) -> Plan:
    policy = BY_NAME[name]
    return Plan(policy=policy if policy.kept == 1.0 else dataclasses.replace(policy, kept=KEPT))


def _engine(copied_folder: Path, policy: Policy, folder: Path) -> Engine:
    """An engine of ``policy``: the dense pieces are the same whatever the policy, and the manifest holds the KV ops."""
    shutil.copytree(copied_folder, folder, copy_function=os.link)
    manifest = load_manifest(copied_folder)
    config = manifest.config
    programs = {
        phase: program_of(policy, phase=phase, n_layers=config.n_layers, scale=config.scale, page_size=manifest.page_size)
        for phase in PHASES
    }
    (folder / "manifest.json").unlink()
    versions = {node.op: OP_VERSION for program in programs.values() for nodes in program for node in nodes}
    dataclasses.replace(manifest, policy=policy, programs=programs, op_versions=versions).save(folder)
    return Engine.load(folder, cache_tokens=2500, verify=False)


def _cases(folder: Path) -> list[Case]:
    """Documents of less than a chunk of prefill, and of several."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tasks = [
        *evaluation_tasks(1, context_length=420, n_facts=6),
        *distractor_tasks(1, context_length=1060, n_distractors=20),
        *plain_text_tasks(1, context_length=600, answer_length=40),
        *copy_tasks(1, context_length=550),
    ]
    return [case_from_task(task, lambda text: list(tokenizer.encode(text).ids)) for task in tasks]


def _kv(pool: KvPool[Any], sequence: SequenceCache, layer: int) -> np.ndarray:
    """Keys and values [2, K, S, D] that a layer of a sequence holds, in slot order."""
    n_cached = int(sequence.kv_len[layer])
    pages = pages_of(sequence.page_table[:, None], layer, 0, n_cached, pool.page_size)
    return np.stack(gather_kv(pool.kv, pages, n_cached))


@pytest.mark.parametrize("name", COMPARED)
def test_a_policy_answers_as_an_engine_built_with_it_does(
    name: str, harness: Harness, copied_folder: Path, tmp_path: Path
) -> None:
    """In one batch with others, one token after the other, eviction while decoding included."""
    plan = _plan(name)
    engine = _engine(copied_folder, plan.policy, tmp_path / "engine")
    full = Plan(policy=BY_NAME["full"])
    others = [full, _plan("h2o"), plan, _plan("streamingllm"), plan]
    differs = []
    for case in _cases(copied_folder):
        made = engine.generate(case.prompt, max_new_tokens=N_DECODED).token_ids
        outcomes, _ = harness.run(dataclasses.replace(case, answer=made), others)
        assert outcomes[2].tokens == outcomes[4].tokens == made
        assert outcomes[2].right
        differs.append(outcomes[0].tokens != made)
    assert any(differs), "the eviction must show in some documents"


@pytest.mark.parametrize("name", COMPARED)
def test_a_policy_keeps_what_an_engine_built_with_it_keeps(
    name: str, harness: Harness, copied_folder: Path, tmp_path: Path
) -> None:
    """The same tokens in every KV head, with the same keys and values, also after the answer."""
    plan = _plan(name)
    runner = _engine(copied_folder, plan.policy, tmp_path / "engine").runner
    for case in _cases(copied_folder)[:2]:
        own = runner.new_sequence()
        runner.prefill(own, case.prompt)
        with harness.prefilled(case.prompt, [plan]) as whole:
            fork = harness.forked(whole.sequence, plan)
            for step in (0, 1):
                assert fork.kv_len.tolist() == own.kv_len.tolist()
                for layer in range(own.n_layers):
                    theirs = harness.runner.kept_positions(fork, layer)
                    np.testing.assert_array_equal(theirs, runner.kept_positions(own, layer))
                    np.testing.assert_allclose(_kv(harness.pool, fork, layer), _kv(runner.pool, own, layer), atol=1e-5)
                if step == 0:
                    harness.decode([fork], [plan], case.fed)
                    for token in case.fed[:-1]:
                        runner.decode([own], [token])
            fork.release()
        own.release()
    harness.pool.check_integrity([])


def test_a_calibrated_policy_answers_as_its_engine_does(harness: Harness, half_folder: Path) -> None:
    engine = Engine.load(half_folder, cache_tokens=2500)
    plans = [Plan(policy=BY_NAME["full"]), Plan(policy=policy_from_name("prefixkv_paper"), kept_shares=SHARES)]
    seen = set()
    for case in _cases(half_folder):
        made = engine.generate(case.prompt, max_new_tokens=40).token_ids
        (full, prefixkv), _ = harness.run(dataclasses.replace(case, answer=made), plans)
        assert prefixkv.tokens == made
        seen.add(full.tokens == made)
    assert False in seen, "the eviction must show in some documents"


def test_the_full_cache_answers_and_loses_nothing_alone_or_beside_others(harness: Harness, full_folder: Path) -> None:
    case = _cases(full_folder)[0]
    alone = harness.full(case)
    (beside, _), sink_mass = harness.run(case, [Plan(policy=BY_NAME["full"]), _plan("snapkv")])
    for outcome in (alone, beside):
        assert outcome.right
        assert outcome.tokens == case.answer
        assert outcome.kept_by_layer == (1.0,) * 8
        assert outcome.fact_kept == outcome.question_kept == 1.0
        assert outcome.kept_place == pytest.approx(0.5)
    assert alone.loss == pytest.approx(beside.loss, abs=1e-4)
    assert len(sink_mass) == 8
    assert all(0.0 <= mass <= 1.0 for mass in sink_mass)


def test_what_is_kept_is_told_by_position(harness: Harness, full_folder: Path) -> None:
    case = _cases(full_folder)[0]
    (recency,), _ = harness.run(case, [_plan("streamingllm")])
    n_tokens = len(case.prompt)
    n_kept = n_tokens - round((1 - KEPT) * n_tokens)
    kept = [*range(4), *range(n_tokens - n_kept + 4, n_tokens)]
    assert recency.kept_tokens == 8 * n_kept
    assert recency.kept_place == pytest.approx(np.mean(kept) / (n_tokens - 1))
    assert recency.question_kept == 1.0
    assert recency.fact_kept == np.isin(case.fact, kept).mean()


def test_lots_follow_their_seed(harness: Harness, full_folder: Path) -> None:
    case = _cases(full_folder)[0]
    plan = _plan("random")
    other = Plan(policy=dataclasses.replace(plan.policy, seed=7))
    (first, again, another), _ = harness.run(case, [plan, plan, other])
    assert first == again
    assert first.kept_place != another.kept_place
    assert first.kept_tokens == another.kept_tokens


def test_shares_searched_for_the_input_meet_the_budget(harness: Harness, full_folder: Path) -> None:
    case = _cases(full_folder)[1]
    policy = dataclasses.replace(BY_NAME["window"], kept=KEPT)
    (searched,), _ = harness.run(case, [Plan(policy=policy, searches=True)])
    assert searched.kept_tokens / (8 * len(case.prompt)) == pytest.approx(KEPT, abs=0.001)
    assert max(searched.kept_by_layer) > 1.5 * min(searched.kept_by_layer)


def test_a_looser_threshold_keeps_no_more_of_any_input(harness: Harness, full_folder: Path) -> None:
    names = ("refreekv-0.001", "refreekv-0.003", "refreekv", "refreekv-0.03", "refreekv-0.1")
    for case in _cases(full_folder):
        outcomes, _ = harness.run(case, [_plan(name) for name in names])
        kept = [outcome.kept_by_layer for outcome in outcomes]
        assert all(np.all(np.array(tighter) >= looser) for tighter, looser in itertools.pairwise(kept))
        assert all(shares[:2] == (1.0, 1.0) for shares in kept)
        assert sum(kept[0]) > sum(kept[-1])


def test_a_run_gives_all_memory_back_also_when_it_fails(harness: Harness, full_folder: Path) -> None:
    case = _cases(full_folder)[0]
    harness.run(case, [_plan("snapkv")])
    harness.full(case)
    harness.pool.check_integrity([])
    broken = Plan(policy=dataclasses.replace(BY_NAME["refreekv"], exempt_layers=(40,)))
    with pytest.raises(UsageError, match="exempts layers"):
        harness.run(case, [_plan("snapkv"), broken])
    harness.pool.check_integrity([])
