"""Every preset at run time: what is kept after a prompt, and what becomes of it while decoding."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.engines import CHUNK, SHARES, assert_nothing_leaked, build_for_test, load_for_test, predictors_for, random_ids
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.layer_budget import layer_budgets
from trt_kv.policies import policy_names, policy_without_floor
from trt_kv.policy import Policy
from trt_kv.program import PHASES, program_of
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.model_runner import ModelRunner

N_LAYERS = len(SHARES)
EVICTING = [name for name in policy_names() if policy_without_floor(name).evicts]
ADAPTIVE = [name for name in EVICTING if policy_without_floor(name).budget == "unimetric"]
N_PROMPT, N_DECODED = 200, 12


def runner_of(engine: Engine, policy: Policy, *, chunk: int = CHUNK, implementation: str = "cpu") -> ModelRunner:
    """The bundled model's dense pieces under another policy; recipes are ``SHARES``."""
    steps = engine.runner._executor
    assert isinstance(steps, SplitStepExecutor)
    programs = {
        phase: program_of(
            policy,
            phase=phase,
            n_layers=N_LAYERS,
            scale=32**-0.5,
            page_size=32,
            kept_shares=SHARES,
            predictors=predictors_for(policy, engine.manifest.config),
        )
        for phase in PHASES
    }
    return host_runner(
        steps.dense, engine.runner.pool, programs, chunk=chunk, decode=policy.decode, implementation=implementation
    )


def kept_after(runner: ModelRunner, ids: list[int]) -> list[list[list[int]]]:
    """Sorted positions per layer and KV head after a prompt."""
    sequence = runner.new_sequence()
    runner.prefill(sequence, ids)
    kept = [np.sort(runner.kept_positions(sequence, layer)).tolist() for layer in range(N_LAYERS)]
    sequence.release()
    return kept


@pytest.mark.parametrize("name", EVICTING)
def test_a_preset_keeps_its_budgets_and_decodes_as_it_says(name: str, full_engine: Engine) -> None:
    policy = policy_without_floor(name)
    runner = runner_of(full_engine, policy)
    sequence = runner.new_sequence()
    ids = random_ids(full_engine, N_PROMPT, seed=5)
    runner.prefill(sequence, ids)
    kept = sequence.kv_len.copy()
    for layer, budget in enumerate(layer_budgets(policy, N_LAYERS, SHARES)):
        if policy.budget not in ("unimetric", "above") or layer in policy.exempt_layers:
            protected = min(N_PROMPT, policy.sinks + policy.recent)
            assert kept[layer] == max(budget.of(N_PROMPT), protected if budget.share < 1 else 0)
        positions_KS = runner.kept_positions(sequence, layer)
        assert positions_KS.shape == (2, kept[layer])
        for positions in positions_KS.tolist():
            assert positions == sorted(set(positions))
            assert set(range(policy.sinks)) <= set(positions)
            assert set(range(N_PROMPT - policy.recent, N_PROMPT)) <= set(positions)
    for token_id in random_ids(full_engine, N_DECODED, seed=6):
        runner.decode([sequence], [token_id])
    newest = sequence.num_computed_tokens - 1
    for layer in range(N_LAYERS):
        grown = int(sequence.kv_len[layer] - kept[layer])
        assert grown == {"keep": N_DECODED, "rank": 0}.get(policy.decode, grown)
        assert 0 <= grown <= N_DECODED
        assert all(newest in heads for heads in runner.kept_positions(sequence, layer).tolist()) or policy.score == "random"
    sequence.release()
    assert_nothing_leaked(full_engine)


@pytest.mark.parametrize("name", EVICTING)
def test_a_batch_decodes_each_sequence_as_if_it_were_alone(name: str, full_engine: Engine) -> None:
    runner = runner_of(full_engine, policy_without_floor(name))
    prompts = [random_ids(full_engine, n, seed=n) for n in (70, 131)]
    generated = random_ids(full_engine, 6, seed=9)

    def logits_of(chosen: list[list[int]]) -> np.ndarray:
        sequences = [runner.new_sequence() for _ in chosen]
        for sequence, prompt in zip(sequences, chosen, strict=True):
            runner.prefill(sequence, prompt)
        logits = np.stack([runner.decode(sequences, [token] * len(chosen)) for token in generated], axis=1)
        for sequence in sequences:
            sequence.release()
        return logits

    np.testing.assert_array_equal(logits_of(prompts), np.concatenate([logits_of([prompt]) for prompt in prompts]))


@pytest.mark.parametrize("name", EVICTING)
def test_kernels_keep_what_the_references_keep(name: str, full_engine: Engine) -> None:
    policy = policy_without_floor(name)
    ids = random_ids(full_engine, 90, seed=4)
    fast, plain = (kept_after(runner_of(full_engine, policy, implementation=i), ids) for i in ("cpu", "reference"))
    for layer in range(N_LAYERS):
        for ours, reference in zip(fast[layer], plain[layer], strict=True):
            assert len(ours) == len(reference)
            assert len(set(ours) - set(reference)) <= 1, "rounding may swap two tokens of equal score, not more"


@pytest.mark.parametrize("name", [*ADAPTIVE, "kvzap"])
def test_a_budget_found_from_the_input_does_not_hang_on_chunks(name: str, full_engine: Engine) -> None:
    ids = random_ids(full_engine, 150, seed=8)
    lengths = [
        [len(heads[0]) for heads in kept_after(runner_of(full_engine, policy_without_floor(name), chunk=chunk), ids)]
        for chunk in (37, 64, 512)
    ]
    assert lengths[0] == lengths[1] == lengths[2]


@pytest.mark.parametrize("name", ADAPTIVE)
def test_a_looser_threshold_keeps_less(name: str, full_engine: Engine) -> None:
    ids = random_ids(full_engine, 180, seed=3)
    totals = []
    for threshold in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3):
        policy = dataclasses.replace(policy_without_floor(name), threshold=threshold)
        totals.append(sum(len(heads[0]) for heads in kept_after(runner_of(full_engine, policy), ids)))
    assert totals == sorted(totals, reverse=True)
    assert totals[0] > totals[-1]


def test_random_tokens_are_drawn_again_alike(full_engine: Engine) -> None:
    ids = random_ids(full_engine, 120, seed=2)
    policy = policy_without_floor("random")
    first, again = (kept_after(runner_of(full_engine, policy), ids) for _ in range(2))
    other = kept_after(runner_of(full_engine, dataclasses.replace(policy, seed=1)), ids)
    assert first == again
    assert first != other


def test_an_added_policy_becomes_an_engine(policy_folder: Path, small_checkpoint_folder: Path, tmp_path: Path) -> None:
    """One file in a folder of policies, and nothing else: an engine is built, loads, and applies it."""
    (policy_folder / "lastwords.py").write_text(
        '"""What the last 16 queries look at, in a cache of 24 tokens."""\n\n'
        "from trt_kv.policy import Policy\n\n"
        'POLICY = Policy(name="lastwords", summary="24 tokens", score="window", budget="constant", tokens=24,'
        ' window=16, decode="rank")\n'
    )
    request = EngineRequest(checkpoint=open_checkpoint(small_checkpoint_folder), policy=policy_without_floor("lastwords"))
    engine = load_for_test(build_for_test(request, tmp_path / "engine"))
    generation = engine.generate(random_ids(engine, 60, seed=1), max_new_tokens=10, temperature=1.0)
    assert generation.kv_tokens == (24, 24, 24)
