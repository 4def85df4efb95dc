"""Device-driven recall: bit for bit what attention over the whole cache gives, whenever the side work is done."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.device_recall_cases import BLOCKWISE, CASES, Case
from tests.device_recall_rig import ReplayedSteps, World, over_layers, play, pool_of, states_of
from tests.triton_kernels import EACH_CAPABILITY, ROOT
from trt_kv.errors import CapacityError, UsageError
from trt_kv.plugins.recall_attention.page_counts import CODES
from trt_kv.plugins.triton_compile import MODELS, SHARED_BYTES, compiled
from trt_kv.plugins.triton_launch import Launch, recording
from trt_kv.program import OpNode

pytestmark = [pytest.mark.early, pytest.mark.slow]

Errors = dict[str, str]


def errors_in_interpreter(which: str, folder: Path) -> Errors:
    """What went wrong in cases played by ``tests.device_recall_rig``, by their names."""
    command = [sys.executable, "-m", "tests.device_recall_rig", which, str(folder / "errors.json")]
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True)
    errors: Errors = json.loads((folder / "errors.json").read_text())
    return errors


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> Errors:
    return errors_in_interpreter("fast", tmp_path_factory.mktemp("fast"))


@pytest.mark.parametrize("case", [*CASES, BLOCKWISE], ids=lambda case: case.name)
def test_outputs_equal_attention_over_the_whole_cache(errors: Errors, case: Case) -> None:
    """Outputs, corrections and host pages bit for bit; nothing else is touched; only missing pages move, by the CPU's rule."""
    assert errors.get(case.name) is None, errors[case.name]


@pytest.mark.timeout(900)
def test_outputs_equal_attention_over_the_whole_cache_in_many_more_worlds(tmp_path: Path) -> None:
    errors = errors_in_interpreter("slow", tmp_path)
    assert not errors, "\n".join(f"{name}: {error}" for name, error in errors.items())


def test_an_executor_of_whole_steps_recalls_from_the_host(small_checkpoint_folder: Path) -> None:
    """A decoder's requests, padded to buckets: logits bit for bit those with the whole cache on the device."""
    command = [sys.executable, "-m", "tests.device_recall_requests", str(small_checkpoint_folder)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    outcome = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_on_the_gpu_an_executor_of_whole_steps_recalls_from_the_host(
    small_checkpoint_folder: Path, *, cuda_graphs: bool
) -> None:
    from tests.device_recall_requests import check
    from trt_kv.export.checkpoints.opening import open_checkpoint

    check(open_checkpoint(small_checkpoint_folder), device="cuda", cuda_graphs=cuda_graphs)


def recall_of(case: Case, **changes: Any) -> Any:
    from trt_kv.runtime.backends.cuda.recall.driver import DeviceRecall, RecallCapacity

    sizes = {"host_pages": 9, "sequences": 1, "longest_prompt": 40, "largest_chunk": 8}
    return DeviceRecall(
        changes.get("program", case.program),
        RecallCapacity(**sizes | changes.get("capacity", {})),
        pool_of(case, "cpu"),
        n_query_heads=case.heads[0],
    )


def test_what_cannot_be_planned_is_refused() -> None:
    case = Case(name="refused")
    found = (*case.program, (OpNode(op="AdaptiveBudget", attributes={}),))
    with pytest.raises(UsageError, match="budgets that do not depend on the prompt"):
        recall_of(case, program=found)
    with pytest.raises(UsageError, match="no layer recalls"):
        recall_of(case, program=((OpNode(op="CachedAttention", attributes={}),),))
    with pytest.raises(UsageError, match="bad sizes for recall"):
        recall_of(case, capacity={"sequences": 0})


def test_blocks_are_planned_for_the_largest_budget_and_given_back() -> None:
    case = Case(name="share", kept_tokens=12, kept_share=0.5, sinks=3, recent=6, n_layers=2)
    sets = recall_of(case, capacity={"longest_prompt": 80}).sets
    assert (sets.sizes.own_pages, sets.sizes.n_chosen, sets.sizes.n_slots) == (4, 9, 12)
    assert len(sets.tensors.kv) == 3 * 16
    assert sets.block_of.tolist() == [2] * 9
    assert [sets.allocate(row) for row in (5, 3)] == [0, 1]
    with pytest.raises(CapacityError, match="every working set"):
        sets.allocate(7)
    sets.release([5, 8])
    assert sets.allocate(7) == 0
    assert sets.block_of.tolist() == [2, 2, 2, 1, 2, 2, 2, 0, 2]


def decode_launches(model: str, dtype: str, summary: int = 0) -> list[Launch]:
    """What a decode step of one layer launches, at 4096 tokens of budget."""
    from trt_kv.runtime.backends.cuda.recall.driver import DeviceRecall, RecallCapacity

    n_heads, n_kv_heads, head_size = (MODELS[model][axis] for axis in "HKD")
    heads = n_heads, n_kv_heads, head_size
    sizes: dict[str, Any] = {"page_size": 32, "kept_tokens": 4096, "sinks": 512, "recent": 512}
    case = Case(name=model, **sizes, heads=heads, dtype=dtype, summary=summary)
    capacity = RecallCapacity(host_pages=8192, sequences=4, longest_prompt=32768, largest_chunk=2048)
    recall = DeviceRecall(case.program, capacity, pool_of(case, "meta"), n_query_heads=n_heads)
    integers = {
        **dict.fromkeys(("positions", "prompt_remaining", "prompt_len"), (4,)),
        **dict.fromkeys(("kv_len", "adaptive_budget", "query_rows", "slots"), (1, 4)),
        "cu_tokens": (5,),
        "page_table": (1, 4, 1024),
    }
    floats = {name: (1, 4, n, head_size) for name, n in (("q", n_heads), ("k", n_kv_heads), ("v", n_kv_heads))}
    values = {name: torch.empty(shape, dtype=torch.int64, device="meta") for name, shape in integers.items()}
    values |= {name: torch.empty(shape, dtype=recall.host.kv.dtype, device="meta") for name, shape in floats.items()}
    with recording() as launches:
        over_layers(recall.kernels("decode"), case.program, states_of(recall.device) | values)
    return launches


def test_a_decode_step_only_launches() -> None:
    """On tensors without contents: whatever looked into one would fail. Both halves of both recalls are among the launches."""
    names = [launch.name for launch in decode_launches("Llama-3.1-8B", "float16")]
    ahead = ["bound_kernel", "choose_kernel"], ["plan_kernel", "recall_kernel"], ["recall_kernel"]
    at_once = ["bound_kernel", "now_kernel", "recall_kernel"]
    assert names == ["begin_kernel", *ahead[0], *at_once, *ahead[1], "decode_kernel", "combine_kernel", *ahead[2]]


def test_a_step_that_ranks_by_codes_launches_as_much() -> None:
    by_bounds, by_codes = (
        [launch.name for launch in decode_launches("Llama-3.1-8B", "float16", summary)] for summary in (0, CODES)
    )
    assert by_codes == [{"bound_kernel": "estimate_kernel"}.get(name, name) for name in by_bounds]


NEW = ("begin_kernel", "now_kernel", "plan_kernel", "choose_kernel", "recall_kernel")


@pytest.mark.parametrize("capability", EACH_CAPABILITY)
def test_kernels_compile_for_every_gpu_we_name(capability: int) -> None:
    """Without spilling registers, but for what the assembler puts away where a wide program ranks pages."""
    kinds = [("Llama-3.1-8B", "float16")]
    if capability == 90:
        kinds += [("Llama-3.2-1B", "bfloat16"), ("Qwen2.5-7B", "float32")]
    all_launches = [launch for kind in kinds for summary in (0, CODES) for launch in decode_launches(*kind, summary)]
    launches = {launch.key: launch for launch in all_launches if launch.name in NEW}
    assert {launch.name for launch in launches.values()} == set(NEW)
    for launch in launches.values():
        resources = compiled(launch, capability)
        assert f".target sm_{capability}" in resources.ptx
        assert resources.shared_bytes <= SHARED_BYTES[capability]
        assert resources.local_bytes <= (64 if "MANY" in launch.constants else 0), f"{launch.name} spills on sm_{capability}"


REAL = Case(
    name="real",
    page_size=32,
    heads=(8, 2, 64),
    n_layers=3,
    sinks=64,
    recent=64,
    kept_tokens=1024,
    chunk=512,
    n_table=160,
    prompts=(3000, 700, 4100),
    n_steps=100,
    dtype="float16",
)


@pytest.mark.gpu
@pytest.mark.parametrize("tau", [-1.01, 0.5, 0.7, 1.01])
@pytest.mark.parametrize("case", [CASES[1], REAL], ids=lambda case: case.name)
def test_on_the_gpu_streams_and_graphs_change_nothing(case: Case, tau: float) -> None:
    """Over many steps: in place against the op over the whole cache, then a stream of its own, then replayed graphs."""
    from trt_kv.runtime.backends.cuda.recall.background import InPlace

    case = dataclasses.replace(case, tau=tau, n_steps=100, n_table=max(case.n_table, 40))
    in_place = play(World(case=case, device="cuda", side=InPlace()))
    streamed = play(World(case=case, device="cuda", compares=False))
    world = World(case=case, device="cuda", compares=False)
    world.decode = ReplayedSteps(world.recall.kernels("decode"), case.program)
    replayed = play(world)
    for expected, *others in zip(in_place, streamed, replayed, strict=True):
        for other in others:
            np.testing.assert_array_equal(other, expected)
    assert world.decode.n_graphs <= len(case.prompts)


@pytest.mark.gpu
def test_a_decode_step_on_the_gpu_waits_for_nothing() -> None:
    world = World(case=CASES[1], device="cuda", compares=False)
    streams = [world.arrive(n) for n in CASES[1].prompts]
    world.step("decode", [(stream, 1) for stream in streams])
    values = world._values([(stream, 1) for stream in streams])
    torch.cuda.set_sync_debug_mode("error")
    try:
        over_layers(world.recall.kernels("decode"), CASES[1].program, values)
    finally:
        torch.cuda.set_sync_debug_mode("default")
