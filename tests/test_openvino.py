"""The dense layers in OpenVINO: those of ONNX Runtime, each row by itself, on threads that all segments share."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.engines import CACHE_TOKENS, CHUNK, Run, build_for_test, random_ids
from trt_kv.errors import EngineError, MissingDependencyError, UnknownNameError, UsageError
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.manifest import GRAPHS, Quantization, load_manifest
from trt_kv.pipeline import DeviceChoice
from trt_kv.plugins.paging import Floats
from trt_kv.policies import policy_from_name
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.onnxruntime_segments import OnnxRuntimeExecutor
from trt_kv.runtime.backends.host.openvino_segments import OpenVinoExecutor, padded
from trt_kv.runtime.engine import Engine

TOLERANCES = {"float32": 1e-5, "bfloat16": 3e-2}
"""Largest difference of logits, as a share of the largest logit."""

needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="OpenVINO is not installed")


def logits_of(dense: DenseExecutor, n_rows: int, logit_rows: int) -> Floats:
    """Logits of the last rows of ``n_rows`` tokens, which are the first of always the same tokens."""
    ids = np.arange(n_rows) * 7 % 61
    return dense.run(ids, np.arange(n_rows), np.arange(n_rows - logit_rows, n_rows), one_by_one)


def one_by_one(layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
    """In place of attention: what is computed of each token depends on that token alone."""
    return v.repeat(q.shape[1] // v.shape[1], axis=1) + 0.1 * q


@pytest.fixture(params=TOLERANCES)
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def executor(small_folder: Path, precision: str) -> OpenVinoExecutor:
    manifest = load_manifest(small_folder)
    return OpenVinoExecutor(
        small_folder / GRAPHS, manifest.segments, manifest.attention_ports, precision=precision, n_threads=1
    )


@needs_openvino
def test_logits_are_those_of_onnx_runtime(executor: OpenVinoExecutor, small_folder: Path, precision: str) -> None:
    manifest = load_manifest(small_folder)
    other = OnnxRuntimeExecutor(small_folder / GRAPHS, manifest.segments, manifest.attention_ports, n_threads=1)
    for n_rows in (1, 19, 100):
        expected = logits_of(other, n_rows, n_rows)
        found = logits_of(executor, n_rows, n_rows)
        assert found.shape == expected.shape
        assert np.abs(found - expected).max() <= TOLERANCES[precision] * np.abs(expected).max()


@needs_openvino
def test_a_row_does_not_depend_on_the_number_of_rows(executor: OpenVinoExecutor) -> None:
    whole = logits_of(executor, 130, 130)
    for n_rows in (1, 2, 3, 5, 9, 17, 40, 64, 101):
        for n_logits in (1, min(3, n_rows)):
            found = logits_of(executor, n_rows, n_logits)
            np.testing.assert_array_equal(found, whole[n_rows - n_logits : n_rows])


@needs_openvino
def test_results_are_the_callers_own(executor: OpenVinoExecutor) -> None:
    """Nothing that a step returned, or passed to attention, changes in a later step."""
    seen: list[tuple[np.ndarray, np.ndarray]] = []

    def attend(layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
        seen.extend((array, array.copy()) for array in (q, k, v))
        return one_by_one(layer, q, k, v)

    for ids in (np.arange(8), np.arange(8) + 9):
        logits = executor.run(ids, np.arange(8), np.arange(8), attend)
        seen.append((logits, logits.copy()))
    for array, copy in seen:
        np.testing.assert_array_equal(array, copy)


@needs_openvino
def test_an_engine_generates_the_same_text(small_folder: Path, small_engine: Engine) -> None:
    prompts = [random_ids(small_engine, n, seed=n) for n in (3, 90, 40)]
    expected = small_engine.generate_batch(prompts, max_new_tokens=12)
    options = {"cache_tokens": CACHE_TOKENS, "chunk": CHUNK, "n_threads": 1}
    with Engine.load(small_folder, dense="openvino", **options) as engine:  # type: ignore[arg-type]
        assert "OpenVINO" in engine.runner.description
        assert [r.token_ids for r in engine.generate_batch(prompts, max_new_tokens=12)] == [r.token_ids for r in expected]


COUNT = """
import os, sys
from trt_kv import Engine
before = len(os.listdir("/proc/self/task"))
with Engine.load(sys.argv[1], dense="openvino", n_threads=2, cache_tokens=500) as engine:
    engine.generate([1, 5, 9], max_new_tokens=2)
    print(len(os.listdir("/proc/self/task")) - before)
"""


@needs_openvino
@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_segments_have_no_threads_of_their_own(small_folder: Path) -> None:
    """One more than the caller's for OpenVINO, and the KV kernels', of which there are as many as cores."""
    done = subprocess.run(
        [sys.executable, "-c", COUNT, str(small_folder)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "NUMBA_NUM_THREADS": "2"},
    )
    assert int(done.stdout) <= 3


@pytest.mark.parametrize("n_rows", [1, 7, 15, 16, 17, 100, 511, 512, 513])
def test_steps_have_one_of_few_numbers_of_rows(n_rows: int) -> None:
    assert n_rows <= padded(n_rows) <= n_rows * 1.125 + 1
    assert len({padded(n) for n in range(257, 513)}) == 8


@needs_openvino
def test_a_damaged_segment_is_named(broken: Path) -> None:
    manifest = load_manifest(broken)
    (broken / GRAPHS / manifest.segments[1].file).write_bytes(b"nonsense")
    with pytest.raises(EngineError, match=r"OpenVINO cannot load .*segment_01\.onnx"):
        OpenVinoExecutor(broken / GRAPHS, manifest.segments, manifest.attention_ports)


def test_unknown_and_useless_choices_are_refused(small_folder: Path) -> None:
    with pytest.raises(UnknownNameError, match="openvino"):
        Engine.load(small_folder, dense="torch")
    with pytest.raises(UnknownNameError, match="bfloat16"):
        Engine.load(small_folder, dense="openvino", precision="float8")
    with pytest.raises(UsageError, match="--dense openvino"):
        Engine.load(small_folder, precision="bfloat16")
    with pytest.raises(UsageError, match="--quant"):
        Engine.load(small_folder, dense="openvino", precision="int8")
    with pytest.raises(UsageError, match="leave --precision out"):
        DeviceChoice(device="cuda", precision="bfloat16")
    assert DeviceChoice(dense="openvino", precision="bfloat16").options["precision"] == "bfloat16"


def test_without_the_package_the_extra_is_named(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"trt-kv\[openvino\]"):
        Engine.load(small_folder, dense="openvino")


@needs_openvino
def test_the_command_line_takes_it(run: Run, small_folder: Path) -> None:
    words = ["generate", small_folder, "a b c", "--max-new-tokens", "3", "--threads", "1", "--cache-tokens", "200"]
    code, text, _ = run(*words, "--dense", "openvino", "--precision", "float32")
    assert (code, text) == run(*words)[:2]
    assert code == 0


@needs_openvino
@pytest.mark.parametrize(
    ("quantization", "tolerance"),
    [
        (Quantization(bits=4, block_size=32, symmetric=True, accuracy_level=0), 1e-5),
        (Quantization(bits=4, block_size=32, symmetric=True, accuracy_level=4), 0.05),
        (Quantization(bits=8, block_size=32, symmetric=True, accuracy_level=4), 0.05),
    ],
    ids=str,
)
def test_quantised_weights_are_those_of_onnx_runtime(
    quantization: Quantization, tolerance: float, small_checkpoint_folder: Path, tmp_path: Path
) -> None:
    """Gathered embeddings included; and rows do not depend on their number unless that is asked for."""
    checkpoint, policy = open_checkpoint(small_checkpoint_folder), policy_from_name("full")
    request = EngineRequest(checkpoint=checkpoint, policy=policy, page_size=5, quantization=quantization)
    folder = build_for_test(request, tmp_path / "engine")
    logits = {}
    for dense in ("onnxruntime", "openvino"):
        with Engine.load(folder, dense=dense, cache_tokens=300, n_threads=1) as engine:
            steps = engine.runner._executor
            assert isinstance(steps, SplitStepExecutor)
            whole = logits[dense] = logits_of(steps.dense, 70, 70)
            for n_rows in (1, 2, 7, 33):
                np.testing.assert_array_equal(logits_of(steps.dense, n_rows, 1), whole[n_rows - 1 : n_rows])
    expected = logits["onnxruntime"]
    assert np.abs(logits["openvino"] - expected).max() <= tolerance * np.abs(expected).max()
