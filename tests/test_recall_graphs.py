"""Graphs with RecallAttention run in stock ONNX Runtime, and say what the runtime says of pages chosen from a pool in place."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.engines import build_for_test
from tests.test_monolithic_graphs import ATOL, CHUNK, N_DECODED, N_PAGES, PROMPTS, MonolithicRunner
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.manifest import Manifest, load_manifest
from trt_kv.plugins.recall_attention.page_counts import most_rows
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.program import PHASES, recall_nodes
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.onnxruntime_segments import OnnxRuntimeExecutor
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.backends.step import Step, StepResult
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.model_runner import NOT_PROMPT, ModelRunner

pytestmark = [pytest.mark.early, pytest.mark.slow]

Recorded = tuple[list[tuple[Step, StepResult]], KvPool[Any]]

LIMITS: dict[str, Any] = {"tokens": 30, "sinks": 4, "recent": 6}
FREEKV = dataclasses.replace(policy_from_name("freekv"), tau=0.2, **LIMITS)
POLICIES = {
    "freekv": FREEKV,
    "freekv_but_layer_1": dataclasses.replace(FREEKV, exempt_layers=(1,)),
    "freekv_budget_found": dataclasses.replace(FREEKV, budget="unimetric", tokens=0, threshold=0.3),
    "quest": dataclasses.replace(policy_from_name("quest"), **LIMITS),
    "arkvale": dataclasses.replace(policy_from_name("arkvale"), **LIMITS),
    "bestkey": dataclasses.replace(policy_from_name("bestkey"), tau=0.2, **LIMITS),
}


SLOW = {"freekv_but_layer_1"}
"""Quest and ArkVale have a layer too that stays on the device."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(policy, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, policy in POLICIES.items()],
)
def folder(request: pytest.FixtureRequest, small_checkpoint_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine of the small random checkpoint, with pages of 5 tokens, that recalls fewer pages than there are."""
    policy: Policy = request.param
    wanted = EngineRequest(checkpoint=open_checkpoint(small_checkpoint_folder), policy=policy, page_size=5)
    return build_for_test(wanted, tmp_path_factory.mktemp("engines") / "recall")


class Recording(SplitStepExecutor):
    """The ops' CPU kernels between ONNX Runtime's segments, remembering each step and what came of it."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        segments = OnnxRuntimeExecutor(folder / "graphs", manifest.segments, manifest.attention_ports)
        super().__init__(segments, manifest.programs)
        self.steps: list[tuple[Step, StepResult]] = []

    def run_step(self, phase: str, step: Step, pool: KvPool[Any]) -> StepResult:
        result = super().run_step(phase, step, pool)
        self.steps.append((step, result))
        return result


class RecallingRunner(MonolithicRunner):
    """With the states of RecallAttention, poisoned where nothing was written."""

    def __init__(self, graphs: Path, manifest: Manifest) -> None:
        super().__init__(graphs, manifest)
        config, n_rows = manifest.config, rows_of(manifest)
        for layer in range(config.n_layers):
            shape = (N_PAGES, config.n_kv_heads, n_rows, config.head_dim)
            self.states[f"summaries_{layer}"] = np.full(shape, np.nan, np.float32)
            self.states[f"last_query_{layer}"] = np.full((N_PAGES, config.n_heads, config.head_dim), np.nan, np.float32)


def rows_of(manifest: Manifest) -> int:
    return most_rows(manifest.programs["prefill"], manifest.page_size, "float32")


@pytest.fixture(scope="module")
def recorded(folder: Path) -> Recorded:
    """The runtime's steps over two prompts in chunks and greedy decoding of both, and its pool afterwards."""
    manifest = load_manifest(folder)
    config = manifest.config
    pool = HostKvPool(
        n_pages=N_PAGES,
        page_size=manifest.page_size,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
        n_query_heads=config.n_heads,
        summary_rows=rows_of(manifest),
    )
    executor = Recording(folder, manifest)
    runner = ModelRunner(executor, pool, manifest.programs, chunk=CHUNK, decode=manifest.policy.decode)
    sequences = [runner.new_sequence() for _ in PROMPTS]
    next_ids = [
        int(np.argmax(runner.prefill(sequence, list(prompt)))) for sequence, prompt in zip(sequences, PROMPTS, strict=True)
    ]
    for _ in range(N_DECODED):
        next_ids = [int(np.argmax(row)) for row in runner.decode(sequences, next_ids)]
    return executor.steps, pool


def test_graphs_choose_the_pages_that_the_runtime_chooses(folder: Path, recorded: Recorded) -> None:
    """Logits, corrections and found budgets in every step; summaries and remembered queries at the end."""
    manifest = load_manifest(folder)
    steps, pool = recorded
    graphs = RecallingRunner(folder / "graphs", manifest)
    recalling = [layer for layer, node in enumerate(recall_nodes(manifest.programs["prefill"])) if node is not None]
    for step, result in steps:
        outputs = graphs.run(step)
        np.testing.assert_allclose(outputs["logits"], result.logits, atol=ATOL, rtol=0.0)
        assert result.corrected is not None
        for layer in recalling:
            np.testing.assert_array_equal(outputs[f"corrected_{layer}"], result.corrected[layer])
        if manifest.policy.budget == "unimetric" and step.evict.any():
            assert result.adaptive_budget is not None
            found = [outputs[f"budget_{layer}"].tolist() for layer in recalling]
            assert found == result.adaptive_budget.tolist()
    last, _ = steps[-1]
    for layer in recalling:
        for b in range(len(PROMPTS)):
            full = last.page_table[layer, b, : last.kv_len[layer, b] // manifest.page_size]
            bounds, expected = (of[full][:, :, :2] for of in (graphs.states[f"summaries_{layer}"], pool.summaries))
            np.testing.assert_allclose(bounds, expected, atol=ATOL)
            row = last.query_rows[layer, b]
            np.testing.assert_allclose(graphs.states[f"last_query_{layer}"][row], pool.last_query[row], atol=ATOL)


def test_the_run_recalls_and_corrects(folder: Path, recorded: Recorded) -> None:
    """What the test above compares is not nothing: pages are left out, and freekv's heads are corrected now and then."""
    manifest = load_manifest(folder)
    steps, _ = recorded
    decoding = [(step, result) for step, result in steps if step.prompt_remaining[0] == NOT_PROMPT]
    recalling = [layer for layer, node in enumerate(recall_nodes(manifest.programs["decode"])) if node is not None]
    found = decoding[0][0].adaptive_budget[recalling]
    assert (found > 0).all() == (manifest.policy.budget == "unimetric")
    budgets = np.where(found < 0, manifest.policy.tokens, found)
    assert all((step.kv_len[recalling] - budgets > manifest.page_size).any(axis=0).all() for step, _ in decoding)
    corrected = np.stack([result.corrected[recalling] for _, result in decoding if result.corrected is not None])
    if manifest.policy.tau > 1:
        assert corrected.all()
    else:
        assert 0.1 < corrected.mean() < 0.9


def test_segments_are_cut_at_the_ops_that_attend(folder: Path) -> None:
    manifest = load_manifest(folder)
    assert len(manifest.segments) == manifest.config.n_layers + 1
    for segment in manifest.segments:
        model = onnx.load(folder / "graphs" / segment.file, load_external_data=False)
        assert {node.domain for node in model.graph.node} == {""}


@pytest.mark.parametrize("phase", PHASES)
def test_graphs_pass_the_full_check(folder: Path, phase: str) -> None:
    onnx.checker.check_model(str(folder / "graphs" / f"{phase}.onnx"), full_check=True)
