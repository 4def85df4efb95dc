"""The TensorRT executor: what can be told without a GPU here, and marked ``gpu`` what cannot."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.engines import prefixkv_request
from tests.test_op_parity import CASES, by_slot, is_per_slot, live_slots, run
from trt_kv.errors import CapacityError, EngineError, UsageError
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import build_engine
from trt_kv.export.targets.tensorrt_profile import TensorRtOptions
from trt_kv.manifest import Plan
from trt_kv.opspec import Case, OpSpec
from trt_kv.plugins.cases import case_inputs
from trt_kv.policies import policy_from_name
from trt_kv.profiles import build_profile
from trt_kv.program import PHASES, program_of
from trt_kv.runtime.backends.base import StepExecutor
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.backends.step import Step, StepResult
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.loading import LoadOptions
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.reservation import RequestSize

PROGRAMS = {phase: program_of(policy_from_name("full"), phase=phase, n_layers=2, scale=1.0, page_size=4) for phase in PHASES}


@pytest.fixture(scope="module")
def executor(tensorrt: ModuleType) -> ModuleType:
    from trt_kv.runtime.backends.tensorrt import executor as tensorrt_engine

    return tensorrt_engine


class RecordingSteps:
    """A step executor that computes nothing: logits are the positions of the wanted rows."""

    description = "nothing"

    def __init__(self) -> None:
        self.phases: list[str] = []

    def warm_up(self) -> None:
        self.phases.append("warm-up")

    def run_step(self, phase: str, step: Step, pool: KvPool[Any]) -> StepResult:
        self.phases.append(phase)
        return StepResult(logits=step.positions[step.logit_rows, None].astype(np.float32), kept=step.kv_len.copy())


class DevicePool(HostKvPool):
    """A pool that says it is not on the host."""

    on_host = False


def test_a_whole_step_executor_takes_the_place_of_dense_parts_and_kernels() -> None:
    steps = RecordingSteps()
    assert isinstance(steps, StepExecutor)
    pool = HostKvPool(n_pages=8, page_size=4, n_kv_heads=1, head_size=2)
    runner = ModelRunner(steps, pool, PROGRAMS, chunk=3)
    runner.warm_up()
    sequence = runner.new_sequence()
    assert runner.prefill(sequence, [5, 6, 7, 8]) == [3.0]
    assert runner.decode([sequence], [9]).tolist() == [[4.0]]
    assert steps.phases == ["warm-up", "prefill", "prefill", "decode"]


def test_a_dense_executor_and_kernels_are_a_step_executor(small_engine: Engine) -> None:
    assert isinstance(small_engine.runner._executor, SplitStepExecutor)
    assert isinstance(small_engine.runner._executor, StepExecutor)


def test_the_prefill_program_decodes_like_the_decode_program(small_engine: Engine) -> None:
    """Why one plan is enough for both phases: bit for bit the same, through eviction and slot reuse."""
    dense = small_engine.runner._executor.dense  # type: ignore[attr-defined]
    programs = small_engine.manifest.programs
    logits = []
    for given in (programs, dict.fromkeys(programs, programs["prefill"])):
        runner = host_runner(dense, small_engine.runner.pool, given, chunk=16)
        sequences = [runner.new_sequence() for _ in range(2)]
        steps = [runner.prefill(s, [1, *range(9, 9 + n)]) for s, n in zip(sequences, (37, 11), strict=True)]
        steps += [runner.decode(sequences, [20 + i, 40 + i]).ravel() for i in range(8)]
        logits.append(np.concatenate(steps))
        for sequence in sequences:
            sequence.release()
    np.testing.assert_array_equal(logits[0], logits[1])


def test_what_reads_the_pool_on_the_host_refuses_a_pool_on_the_device() -> None:
    pool = DevicePool(n_pages=8, page_size=4, n_kv_heads=1, head_size=2)
    runner = ModelRunner(RecordingSteps(), pool, PROGRAMS)
    sequence = runner.new_sequence()
    runner.prefill(sequence, [5, 6])
    with pytest.raises(UsageError, match="KV pool on the host"):
        runner.scores(sequence)


PROFILES: list[Mapping[str, tuple[int, int, int]]] = [
    {"N": (1, 8, 16), "B": (1, 1, 1)},
    {"N": (17, 32, 64), "B": (1, 1, 1)},
    {"N": (1, 2, 4), "B": (1, 2, 4)},
]


@pytest.mark.parametrize(
    ("sizes", "decoding", "expected"),
    [
        ({"N": 16, "B": 1}, False, 0),
        ({"N": 17, "B": 1}, False, 1),
        ({"N": 1, "B": 1}, False, 0),
        ({"N": 1, "B": 1}, True, 2),
        ({"N": 4, "B": 4}, True, 2),
    ],
)
def test_a_step_runs_in_the_profile_that_admits_it(executor: Any, sizes: dict[str, int], decoding: bool, expected: int) -> None:
    assert executor.profile_index(PROFILES, sizes, newest_first=decoding) == expected


def test_a_step_that_no_profile_admits_is_refused_with_what_is_admitted(executor: Any) -> None:
    with pytest.raises(CapacityError, match=r"17\.\.64"):
        executor.profile_index(PROFILES, {"N": 65, "B": 1})


def test_columns_that_a_page_table_has_beyond_its_pages_do_not_count(executor: Any) -> None:
    """Tables grow by doubling: with 11 pages they have 22 columns, which a plan for 12 does not admit."""
    seen: list[Step] = []

    class Watching(RecordingSteps):
        def run_step(self, phase: str, step: Step, pool: KvPool[Any]) -> StepResult:
            seen.append(executor.with_used_columns(step, 12, pool.page_size))
            return super().run_step(phase, step, pool)

    pool = HostKvPool(n_pages=60, page_size=4, n_kv_heads=1, head_size=2)
    runner = ModelRunner(Watching(), pool, PROGRAMS, chunk=30)
    sequence = runner.new_sequence()
    runner.prefill(sequence, list(range(42)))
    assert [step.page_table.shape[2] for step in seen] == [8, 12]
    assert (seen[-1].page_table[:, 0, :11] == sequence.page_table[:, :11]).all()
    runner.prefill(sequence, list(range(10)))
    assert seen[-1].page_table.shape[2] == 13, "more than the plan admits is not hidden from it"


def test_what_a_plan_does_not_admit_is_refused_before_it_starts(tensorrt: ModuleType, small_engine: Engine) -> None:
    """A request longer than the plan's page tables; and chunks are no longer than its largest step."""
    from trt_kv.runtime.backends.tensorrt.load import chunk_of, reservation_of

    manifest, options = small_engine.manifest, LoadOptions(chunk=512)
    profile = dataclasses.replace(build_profile("edge"), context_tokens=(1, 20, 40), prefill_tokens=((1, 8, 16), (17, 32, 64)))
    ranges = profile.axis_ranges(n_layers=manifest.config.n_layers, page_size=manifest.page_size)
    plan = Plan(file="model.plan", built_by="TensorRT", profiles=tuple(ranges))
    assert chunk_of(plan, options) == 64
    pool = HostKvPool(n_pages=300, page_size=manifest.page_size, n_kv_heads=1, head_size=2)
    reservation = reservation_of(manifest, plan, pool, options)
    reservation.check(RequestSize(n_prompt=40, max_new_tokens=1, n_sequences=4))
    for size in (RequestSize(n_prompt=41, max_new_tokens=1), RequestSize(n_prompt=40, max_new_tokens=40)):
        with pytest.raises(CapacityError, match="build with a PROFILE of longer contexts"):
            reservation.check(size)
    with pytest.raises(CapacityError, match="build with a PROFILE of more sequences"):
        reservation.check(RequestSize(n_prompt=2, max_new_tokens=1, n_sequences=5))


def test_a_plan_that_cannot_be_loaded_says_so(executor: Any, tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"\0" * 64)
    with pytest.raises(EngineError, match="cannot load"):
        executor.engine_from_plan(plan)


@pytest.mark.gpu
@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "copied"])
@pytest.mark.parametrize(("spec", "case"), CASES)
def test_enqueue_on_the_gpu_equals_reference(tensorrt: ModuleType, spec: OpSpec, case: Case, in_place: bool) -> None:
    """The plugin's memory on a GPU, by whatever kernels the op has there."""
    import torch

    from trt_kv.plugins.tensorrt_base import kernels_of
    from trt_kv.plugins.tensorrt_memory import Buffer, CudaMemory, PluginCall

    inputs = case_inputs(spec, case)
    expected = run(spec, "reference", inputs)
    tensors = {t.name: torch.from_numpy(inputs[t.name]).cuda() for t in spec.inputs if t.name in inputs}
    outputs = {t.name: torch.from_numpy(np.zeros_like(expected[t.name])).cuda() for t in spec.outputs}
    outputs |= {f"{t.name}_out": tensors[t.name] if in_place else torch.zeros_like(tensors[t.name]) for t in spec.states}

    def buffers(given: dict[str, torch.Tensor]) -> dict[str, Buffer]:
        names = {torch.float32: "float32", torch.int64: "int64"}
        return {n: Buffer(pointer=t.data_ptr(), shape=tuple(t.shape), dtype=names[t.dtype]) for n, t in given.items()}

    call = PluginCall(
        spec=spec,
        attributes={a.name: inputs[a.name] for a in spec.attributes},
        inputs=buffers(tensors),
        outputs=buffers(outputs),
        stream=torch.cuda.current_stream().cuda_stream,
    )
    CudaMemory().run(call, kernels_of(spec))
    torch.cuda.synchronize()
    live = live_slots(spec, inputs, expected)
    for name, reference in expected.items():
        got = outputs[name].cpu().numpy()
        got, where = (by_slot(name, got), live if is_per_slot(name) else slice(None))
        np.testing.assert_allclose(
            got[where], reference[where], atol=spec.tolerance.atol, rtol=spec.tolerance.rtol, err_msg=name
        )


@pytest.mark.gpu
def test_an_engine_on_tensorrt_generates_what_it_generates_on_the_host(
    tensorrt: ModuleType, small_checkpoint_folder: Path, small_engine: Engine, tmp_path: Path
) -> None:
    """Prefill in chunks, eviction and decoding, three prompts at once."""
    request = prefixkv_request(open_checkpoint(small_checkpoint_folder), (0.6, 0.3, 0.9), budget=0.6)
    options = TensorRtOptions(profile=build_profile("edge"))
    build_engine(dataclasses.replace(request, page_size=5, tensorrt=options), tmp_path / "engine")
    engine = Engine.load(tmp_path / "engine", cache_tokens=1000, chunk=32)
    prompts = [[1, *range(10, 10 + n)] for n in (7, 40, 90)]
    expected = small_engine.generate_batch(prompts, max_new_tokens=16)
    got = engine.generate_batch(prompts, max_new_tokens=16)
    assert [g.token_ids for g in got] == [e.token_ids for e in expected]
    assert [g.kv_tokens for g in got] == [e.kv_tokens for e in expected]
