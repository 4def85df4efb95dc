"""Engines whose dense layers run in kernels of our own: by default where they can, else refused with a reason."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import SAMPLES, write_checkpoint
from tests.engines import build_for_test, random_ids
from tests.packed_engines import logits_of
from trt_kv.cli.inspection import describe_engine
from trt_kv.errors import EngineError, UsageError
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.manifest import GRAPHS, Quantization, load_manifest
from trt_kv.plugins.paging import Floats
from trt_kv.policies import policy_from_name
from trt_kv.program import program_of
from trt_kv.runtime.backends.host.attention_layers import AttentionLayers
from trt_kv.runtime.backends.host.dense import why_not_native
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.engine import Engine
from trt_kv.weight_index import FILE_NAME

pytestmark = pytest.mark.usefixtures("one_thread")

INT4 = Quantization(bits=4, block_size=32, symmetric=False, accuracy_level=4)
LARGE_ENOUGH: dict[str, Any] = {"model_type": "llama", "hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
"""Matrices so large that all of them are packed."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("native")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SAMPLES, "large-enough", LARGE_ENOUGH)
        checkpoint = open_checkpoint(write_checkpoint(base / "checkpoint", "large-enough"))
    request = EngineRequest(checkpoint=checkpoint, policy=policy_from_name("full"), page_size=5, quantization=INT4)
    return build_for_test(request, base / "engine")


def load(folder: Path, dense: str | None = None, **options: Any) -> Engine:
    return Engine.load(folder, cache_tokens=900, n_threads=1, chunk=16, dense=dense, **options)


def logits_in(engine: Engine, ids: np.ndarray) -> Floats:
    steps = engine.runner._executor
    assert isinstance(steps, SplitStepExecutor)
    return logits_of(steps.dense, ids)


def test_they_are_the_default_and_agree_with_onnx_runtime_within_the_rounding(folder: Path) -> None:
    with load(folder) as engine, load(folder, "onnxruntime") as other:
        assert "own kernels" in engine.runner.description
        assert "runs      dense layers in kernels of our own" in describe_engine(folder)
        assert "ONNX Runtime" in other.runner.description
        ids = np.arange(70) * 7 % 269
        expected = logits_in(other, ids)
        assert (logits_in(engine, ids) - expected).std() < 0.05 * expected.std()


def test_a_request_gets_the_same_tokens_alone_and_in_company(folder: Path) -> None:
    with load(folder, "native") as engine:
        prompts = [random_ids(engine, n, seed=n) for n in (37, 5, 16, 1, 50)]
        together = engine.generate_batch(prompts, max_new_tokens=9)
        alone = [engine.generate(prompt, max_new_tokens=9) for prompt in prompts]
    assert [result.token_ids for result in together] == [result.token_ids for result in alone]


def test_a_decode_step_in_one_call_has_the_bits_of_one_layer_after_the_other(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of several lengths, in a batch, over several steps."""

    def decoded(engine: Engine) -> Floats:
        runner = engine.runner
        sequences = [runner.new_sequence() for _ in range(3)]
        for sequence, n in zip(sequences, (37, 5, 16), strict=True):
            runner.prefill(sequence, random_ids(engine, n, seed=n))
        logits = [runner.decode(sequences, [step, step + 3, step + 9]) for step in range(4)]
        for sequence in sequences:
            sequence.release()
        return np.stack(logits)

    with load(folder) as engine:
        steps = engine.runner._executor
        assert isinstance(steps, SplitStepExecutor)
        whole = decoded(engine)
        monkeypatch.setattr(steps, "_attention", None)
        assert np.array_equal(decoded(engine), whole)
        monkeypatch.undo()
        monkeypatch.setattr(steps.dense, "run", lambda *_: pytest.fail("layer after layer"))
        engine.runner.decode([sequence := engine.runner.new_sequence()], [1])
        sequence.release()


def test_a_program_that_does_more_than_attend_is_run_layer_by_layer() -> None:
    def layers(policy: str, phase: str) -> AttentionLayers | None:
        return AttentionLayers.of(
            program_of(policy_from_name(policy), phase=phase, n_layers=2, scale=0.5, page_size=4, windows=(0, 7), soft_cap=3.0)
        )

    found = layers("full", "decode")
    assert found is not None
    assert [numbers.tolist() for numbers in found] == [[0.5, 0.5], [3.0, 3.0], [0, 7]]
    assert layers("snapkv", "decode") is not None
    assert layers("snapkv", "prefill") is None
    assert layers("freekv", "decode") is None


def test_what_they_cannot_run_is_refused_with_the_reason(folder: Path, small_folder: Path) -> None:
    with pytest.raises(UsageError, match="weights that are not quantised"):
        load(small_folder, "native")
    manifest = load_manifest(folder)
    assert why_not_native(folder, manifest) is None
    level_0 = dataclasses.replace(manifest, quantization=dataclasses.replace(INT4, accuracy_level=0))
    assert why_not_native(folder, level_0) == "accuracy level 0"
    earlier = {name: record for name, record in manifest.files.items() if not name.endswith(FILE_NAME)}
    assert "no weights.json" in (why_not_native(folder, dataclasses.replace(manifest, files=earlier)) or "")


def test_a_matrix_that_is_not_packed_is_named(small_checkpoint_folder: Path, tmp_path: Path) -> None:
    """The engine runs all the same, in ONNX Runtime."""
    checkpoint = open_checkpoint(small_checkpoint_folder)
    request = EngineRequest(checkpoint=checkpoint, policy=policy_from_name("full"), page_size=5, quantization=INT4)
    engine = build_for_test(request, tmp_path / "engine")
    with pytest.raises(UsageError, match=r"k_proj\.weight, which is not in blocks of integers"):
        load(engine, "native")
    with load(engine) as loaded:
        assert "ONNX Runtime" in loaded.runner.description


def test_a_file_that_ends_before_its_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "engine")
    stored = broken / GRAPHS / "weights.data"
    stored.chmod(0o644)
    os.truncate(stored, stored.stat().st_size - 1)
    with pytest.raises(EngineError, match="does not hold"):
        why_not_native(broken, load_manifest(broken))
