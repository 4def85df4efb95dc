"""Caches in every type: what holds bit for bit in fp32 holds in them, and engines are built and loaded with them."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines import build_for_test, load_for_test, random_ids
from tests.recall_rig import RandomModel, StepwiseCopies, check_integrity, freekv, generate, prompt_of, runner_of
from tests.serving import Recorder, engine_under, prompts_of, small_policy, steps_changed
from trt_kv.cli.inspection import describe_engine
from trt_kv.errors import TrtKvError, UsageError
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.kv_memory import row_bytes
from trt_kv.manifest import KV_DTYPES, Manifest, load_manifest
from trt_kv.pipeline import BuildRequest, ModelSource, ResourceChoice, TargetPlan
from trt_kv.pipeline.names import default_name
from trt_kv.pipeline.reproduce import command_line_of
from trt_kv.plugins.cases import case_inputs
from trt_kv.plugins.registry import kernel, op_specs
from trt_kv.policies import policy_from_name
from trt_kv.runtime.backends.host import load as host_load
from trt_kv.runtime.backends.host.recall.background import ThreadedCopies
from trt_kv.runtime.backends.host.recall.store import host_tier_at
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.loading import LoadOptions, check_kv_as_computed

SMALLER = [pytest.param(name, marks=() if name == "int8" else pytest.mark.slow) for name in KV_DTYPES if name != "float32"]
"""Kernels of a type take long to compile, and one type is as good as another where rows are only moved."""
LENGTHS = (37, 5, 50)


@pytest.mark.slow  # compiles every kernel
@pytest.mark.parametrize("dtype", KV_DTYPES[1:])
@pytest.mark.parametrize("policy", ["h2o", "refreekv", "freekv"])
def test_a_request_gets_the_logits_it_gets_alone(policy: str, dtype: str, small_engine: Engine) -> None:
    with engine_under(small_engine, small_policy(policy), kv_dtype=dtype) as engine:
        prompts = prompts_of(engine, LENGTHS)
        recorders = []
        for batches in ([[prompt] for prompt in prompts], [prompts]):
            recorders.append(Recorder())
            with steps_changed(engine, recorders[-1]):
                for batch in batches:
                    engine.generate_batch(batch, max_new_tokens=10)
        alone, together = (list(recorder.logits.values()) for recorder in recorders)
        assert [len(logits) for logits in alone] == [10] * 3
        assert sorted(alone) == sorted(together)


@pytest.mark.parametrize("dtype", SMALLER)
def test_streams_files_and_blocks_are_the_op(dtype: str, tmp_path: Path) -> None:
    """Bit for bit: in memory with copies in the worst order, and in a file with threads."""
    model, policy = RandomModel(steadiness=0.8), freekv()
    expected = generate(runner_of(model, policy, dtype=dtype), prompt_of(70), 40)
    assert np.isfinite(expected).all()
    sizes: dict[str, Any] = {"n_pages": 600, "page_size": 4, "n_kv_heads": model.n_kv_heads, "head_size": model.head_size}
    file = host_tier_at(f"file:{tmp_path}", **sizes, dtype=dtype)
    assert file.page_bytes == 2 * model.n_kv_heads * 4 * row_bytes(dtype, model.head_size)
    for copies, host in ((StepwiseCopies(3), None), (ThreadedCopies(), file)):
        runner = runner_of(model, policy, copies=copies, host=host, dtype=dtype)
        np.testing.assert_array_equal(generate(runner, prompt_of(70), 40), expected)
        runner.close()
    assert not np.array_equal(generate(runner_of(model, policy), prompt_of(70), 40), expected)


@pytest.mark.parametrize("dtype", SMALLER)
@pytest.mark.parametrize("streams", [False, True])
def test_a_fork_goes_on_as_its_original(streams: bool, dtype: str) -> None:
    runner = runner_of(RandomModel(), freekv(), copies=StepwiseCopies(1) if streams else None, dtype=dtype)
    one = runner.new_sequence()
    runner.prefill(one, prompt_of(50))
    two = one.fork()
    logits = [[runner.decode([sequence], [step])[0] for step in range(9)] for sequence in (two, one)]
    np.testing.assert_array_equal(logits[0], logits[1])
    one.release()
    two.release()
    check_integrity(runner)


@pytest.mark.parametrize("dtype", ["float32", *SMALLER])
def test_a_chunk_attends_to_its_own_tokens_as_they_are_stored(dtype: str) -> None:
    """So that what a token sees does not depend on where chunks end: one chunk is its tokens one by one."""
    spec = op_specs()["CachedAttention"]
    case = next(case for case in spec.cases if case.new == (23,) or max(case.new) > 5)
    case = dataclasses.replace(case, cached=(11,), new=(9,), values={}, own_tokens=False, in_order=True)
    run, inputs = kernel(spec.name, "cpu"), case_inputs(spec, case, kv_dtype=dtype)
    layer = inputs["layer"]
    ones: dict[str, Any] = {**inputs, "kv": inputs["kv"].copy(), "token_positions": inputs["token_positions"].copy()}
    whole, _ = run(**inputs)
    for at in range(9):
        one = {name: inputs[name][at : at + 1] for name in ("q", "k", "v", "positions")}
        one |= {"slots": inputs["slots"][:, at : at + 1], "cu_tokens": np.array([0, 1]), "kv_len": inputs["kv_len"] - 8 + at}
        assert one["slots"][layer] >= 0
        np.testing.assert_allclose(run(**ones | one)[0][0], whole[at], atol=2e-6)
    np.testing.assert_array_equal(ones["kv"], inputs["kv"])


def test_an_engine_has_a_type_and_is_loaded_with_another(small_folder: Path, small_engine: Engine) -> None:
    ids = random_ids(small_engine, 40, seed=0)
    with Engine.load(small_folder, kv_dtype="int8", cache_tokens=100) as engine:
        config, pool = engine.manifest.config, engine.runner.pool
        per_head = 2 * (config.head_dim + 4) + 8 + 4
        assert pool.page_bytes == engine.manifest.page_size * config.n_kv_heads * per_head
        assert pool.kv.dtype == np.int8
        assert len(engine.generate(ids, max_new_tokens=5).token_ids) == 5
        assert engine.statistics["pages"][pool.name]["used"] == 0
    with pytest.raises(UsageError, match="bad kv_dtype"):
        Engine.load(small_folder, kv_dtype="int4")


def test_a_processor_without_halves_is_told(small_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_load, "converts_halves", lambda: False)
    with pytest.raises(UsageError, match="no instructions for float16"):
        Engine.load(small_folder, kv_dtype="float16")


def test_a_smaller_type_makes_room_for_more_tokens(small_folder: Path) -> None:
    pages = {}
    for dtype in KV_DTYPES:
        pool, _ = host_load._memory(load_manifest(small_folder), LoadOptions(kv_dtype=dtype), 120_000)
        pages[dtype] = pool.n_pages
        assert pool.used_bytes == 0
        assert 50_000 < pool.n_pages * pool.page_bytes < 67_000
    assert pages["float32"] < pages["float16"] == pages["bfloat16"] < pages["int8"]


def test_the_type_is_recorded_and_shown(small_checkpoint_folder: Path, tmp_path: Path) -> None:
    policy = policy_from_name("full")
    request = EngineRequest(checkpoint=open_checkpoint(small_checkpoint_folder), policy=policy, kv_dtype="int8")
    folder = build_for_test(request, tmp_path / "engine")
    with load_for_test(folder) as engine:
        assert (engine.manifest.kv_dtype, engine.runner.pool.kv.dtype) == ("int8", np.int8)
        config = engine.manifest.config
    text = describe_engine(folder)
    bits = 8 * config.n_kv_heads * 2 * (config.head_dim + 4)
    assert "KV cache in int8" in text
    assert f"{bits:,} {bits * config.n_layers:>12,}  this engine" in text
    assert f"{96 * config.n_kv_heads:,}" in text
    assert all(name in text for name in KV_DTYPES)
    built = BuildRequest(source=ModelSource(model="llama3"), policy=policy, target=TargetPlan(kv_dtype="int8"), out=Path())
    assert "--kv-dtype int8" in command_line_of(built)
    assert default_name(built) == "llama3-full-kv-dtype=int8"


@pytest.mark.parametrize("make", [lambda name: TargetPlan(kv_dtype=name), lambda name: ResourceChoice(kv_dtype=name)])
def test_unknown_types_are_refused_by_name(make: Any) -> None:
    with pytest.raises(TrtKvError, match="unknown KV cache type"):
        make("fp8")


def test_a_gpu_stores_what_it_computes_in(small_folder: Path, small_checkpoint_folder: Path) -> None:
    manifest = load_manifest(small_folder)

    def check(built: Manifest, asked: str | None, dtype: str) -> None:
        check_kv_as_computed(small_folder, built, LoadOptions(kv_dtype=asked), dtype)

    check(manifest, None, "bfloat16")
    check(manifest, "bfloat16", "bfloat16")
    in_int8 = dataclasses.replace(manifest, kv_dtype="int8")
    check(in_int8, "float32", "float32")
    for built, asked in ((manifest, "int8"), (in_int8, None), (manifest, "float16")):
        with pytest.raises(UsageError, match="on a GPU the KV cache is stored in the type of the computation"):
            check(built, asked, "float32")
    with pytest.raises(UsageError, match="on a GPU"):
        EngineRequest(
            checkpoint=open_checkpoint(small_checkpoint_folder),
            policy=policy_from_name("full"),
            dtype="bfloat16",
            kv_dtype="int8",
        )
