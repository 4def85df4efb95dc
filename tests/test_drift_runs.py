"""Thresholds measured on the bundled model correct about the wanted share of KV heads on other prompts, too."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from trt_kv.calibration.drift import DriftRecorder, LayerTrace, Trace, calibrate_drift
from trt_kv.calibration.tasks import calibration_prompts, evaluation_tasks
from trt_kv.drift import Drift, drift_settings
from trt_kv.errors import CheckpointError, UsageError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.pipeline.calibration_runs import drift_trace_of, recipe_model
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.recall_attention.choice import drifted_heads
from trt_kv.plugins.registry import kernel, op_specs
from trt_kv.policies import policy_from_name
from trt_kv.policy_settings import policy_with
from trt_kv.program import PHASES, program_of
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.backends.host.torch_decoder import TorchDecoderExecutor
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.text.tokenizer import load_tokenizer

POLICY = policy_with(
    policy_from_name("freekv"), {"tokens": 224, "sinks": 32, "recent": 32, "drift": "calibrated", "exempt_layers": (3,)}
)
N_LAYERS, PAGE_SIZE = 8, 32
N_PROMPT, N_STEPS = 400, 40
RATES = (0.1, 0.3, 0.6)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def traces(bundled_checkpoint: Checkpoint) -> list[tuple[list[int], Trace]]:
    """What four prompts of the calibration split showed."""
    prompts = _encoded(bundled_checkpoint, [t.prompt for t in calibration_prompts(4, context_length=N_PROMPT, seed=3)])
    trace_of = drift_trace_of(bundled_checkpoint, POLICY, N_PROMPT, N_STEPS, page_size=PAGE_SIZE)
    return [(prompt, trace_of(prompt)) for prompt in prompts]


def drift_at(rate: float, checkpoint: Checkpoint, traces: list[tuple[list[int], Trace]]) -> Drift:
    seen = iter(traces)
    return calibrate_drift(
        [prompt for prompt, _ in traces],
        lambda _: next(seen)[1],
        correction_rate=rate,
        model=recipe_model(checkpoint),
        settings=drift_settings(POLICY, PAGE_SIZE),
        source="a test",
        max_new_tokens=N_STEPS,
    )


def corrected_after(checkpoint: Checkpoint, drift: Drift, prompts: list[list[int]]) -> np.ndarray:
    """Which KV heads RecallAttention corrects while the prompts are continued with these thresholds: [L - 1, S, K]."""
    config = checkpoint.config
    taus = [POLICY.tau if tau is None else tau for tau in drift.taus]
    programs = {
        phase: program_of(POLICY, phase=phase, n_layers=N_LAYERS, scale=32**-0.5, page_size=PAGE_SIZE, taus=taus)
        for phase in PHASES
    }
    pool = HostKvPool(
        n_pages=N_LAYERS * 16,
        page_size=PAGE_SIZE,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
        n_query_heads=config.n_heads,
    )
    found: dict[int, list[Any]] = {}
    recall = kernel("RecallAttention", "cpu")

    def watched(**tensors: Any) -> tuple[Any, ...]:
        out, lse, corrected_BK = recall(**tensors)
        if tensors["prompt_remaining"][-1] < 0:
            found.setdefault(tensors["layer"], []).append(corrected_BK[0].copy())
        return out, lse, corrected_BK

    dense = TorchDecoderExecutor(decoder_from_checkpoint(checkpoint))
    runner = ModelRunner(
        SplitStepExecutor(dense, programs, kernels={"RecallAttention": watched}), pool, programs, decode=POLICY.decode
    )
    for prompt in prompts:
        sequence = runner.new_sequence()
        logits_V = runner.prefill(sequence, prompt)
        for _ in range(N_STEPS):
            (logits_V,) = runner.decode([sequence], [int(logits_V.argmax())])
        sequence.release()
    return np.array([found[layer] for layer in sorted(found)])


def test_other_prompts_are_corrected_about_as_often_as_wanted(
    bundled_checkpoint: Checkpoint, traces: list[tuple[list[int], Trace]]
) -> None:
    tasks = evaluation_tasks(3, context_length=N_PROMPT, n_facts=4, seed=11)
    prompts = _encoded(bundled_checkpoint, [task.prompt for task in tasks])
    before = np.zeros(N_LAYERS - 1)
    for rate in RATES:
        corrected_LSK = corrected_after(bundled_checkpoint, drift_at(rate, bundled_checkpoint, traces), prompts)
        assert corrected_LSK.shape == (N_LAYERS - 1, len(prompts) * N_STEPS, 2)
        assert corrected_LSK.mean() == pytest.approx(rate, abs=0.08)
        of_layer = corrected_LSK.mean(axis=(1, 2))
        assert np.abs(of_layer - rate).max() < 0.25
        assert (of_layer > before).all()
        assert corrected_LSK.any(axis=2).mean() > corrected_LSK.mean()
        before = of_layer


def test_a_higher_rate_raises_every_threshold(bundled_checkpoint: Checkpoint, traces: list[tuple[list[int], Trace]]) -> None:
    taus = [[layer.tau for layer in drift_at(rate, bundled_checkpoint, traces).layers] for rate in RATES]
    assert len(set(taus[0])) == N_LAYERS - 1
    assert all(low < high for low, high in zip(taus[0], taus[1], strict=True))
    assert all(low < high for low, high in zip(taus[1], taus[2], strict=True))


def test_pages_of_adjacent_queries_are_compared_where_there_is_a_choice(traces: list[tuple[list[int], Trace]]) -> None:
    for _, trace in traces:
        assert sorted(trace) == [layer for layer in range(N_LAYERS) if layer != 3]
        for found in trace.values():
            assert found.cosine.shape == found.overlap.shape == (N_STEPS, 2)
            assert ((found.overlap >= 0) & (found.overlap <= 1)).all()
            assert 0.3 < found.overlap.mean() < 1.0


@pytest.mark.parametrize("tau", [0.1, 0.6])
def test_the_recorder_sees_what_the_op_decides_by(tau: float) -> None:
    """On a case of the op's spec, cut to its first sequence."""
    spec = op_specs()["RecallAttention"]
    inputs = _first_sequence(case_inputs(spec, next(case for case in spec.cases if case.name == "decode"))) | {"tau": tau}
    recorder = DriftRecorder(kernel("RecallAttention", "reference"))
    layer, n_kv_heads = inputs["layer"], inputs["kv"].shape[2]
    before_HD = inputs["last_query"][inputs["query_rows"][layer, 0]].copy()
    _, _, corrected_BK = recorder(**inputs)
    trace = recorder.taken()[layer]
    assert isinstance(trace, LayerTrace)
    assert (trace.cosine < tau).astype(int).tolist() == corrected_BK.tolist()
    assert drifted_heads(inputs["q"][-1], before_HD, n_kv_heads, tau).astype(int).tolist() == corrected_BK[0].tolist()
    assert recorder.taken() == {}


def test_several_sequences_are_not_recorded_as_one() -> None:
    spec = op_specs()["RecallAttention"]
    with pytest.raises(UsageError, match="one sequence"):
        DriftRecorder(kernel("RecallAttention", "reference"))(**case_inputs(spec, spec.cases[0]))


def _encoded(checkpoint: Checkpoint, texts: list[str]) -> list[list[int]]:
    tokenizer = load_tokenizer(checkpoint.tokenizer_file, error=CheckpointError)
    return [list(tokenizer.encode(text).ids) for text in texts]


def _first_sequence(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a step without all sequences but the first."""
    n_tokens = int(inputs["cu_tokens"][1])
    cut: dict[str, Any] = dict(inputs)
    cut |= {name: inputs[name][:n_tokens] for name in ("q", "k", "v", "positions", "prompt_remaining")}
    cut |= {name: inputs[name][:, :1] for name in ("page_table", "kv_len", "adaptive_budget", "query_rows")}
    return cut | {
        "slots": inputs["slots"][:, :n_tokens],
        "cu_tokens": inputs["cu_tokens"][:2],
        "prompt_len": inputs["prompt_len"][:1],
    }
