"""``Engine.load`` on a device: the host's tokens, memory planned before the first request, and what is refused and how."""

import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.device_engines import CHUNK, N_NEW, build, check, load_on, prompts
from tests.engines import Run
from tests.triton_kernels import ROOT
from trt_kv.errors import CapacityError, UnknownNameError, UsageError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.manifest import Manifest, load_manifest
from trt_kv.program import PHASES, program_of_model
from trt_kv.runtime.backends.cuda import load as device_loading
from trt_kv.runtime.backends.cuda.onnxruntime_segments import CUDA
from trt_kv.runtime.backends.cuda.plan import DevicePlan, Wanted, device_plan
from trt_kv.runtime.backends.cuda.recall.driver import DeviceRecall
from trt_kv.runtime.backends.devices import DeviceOptions, device_from_name
from trt_kv.runtime.backends.onnx_runtime import ort
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.loading import LoadOptions
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.reservation import CachePages, RequestSize

POLICIES = ("full", "prefixkv_paper", "refreekv", "freekv", "bestkey", "freekv-recipe", "h2o-windows", "freekv-windows")
CPU = torch.device("cpu")
POSITIONS = 128
"""Of the small checkpoint."""

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.early, pytest.mark.slow]


@pytest.fixture(scope="module")
def checkpoint(small_checkpoint_folder: Path) -> Checkpoint:
    return open_checkpoint(small_checkpoint_folder)


@pytest.fixture(scope="module")
def folder_of(checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folder = tmp_path_factory.mktemp("device-engines")
    built: dict[str, Path] = {}

    def built_once(name: str) -> Path:
        if name not in built:
            built[name] = build(name, checkpoint, folder)
        return built[name]

    return built_once


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that are loaded and asked, but run nothing: no kernel is compiled."""
    monkeypatch.setattr(ModelRunner, "warm_up", lambda _: None)


@pytest.mark.parametrize(
    ("dense", "names"),
    [
        ("torch", POLICIES),
        ("onnxruntime", ("freekv",)),
        ("prefixes", ("freekv", "bestkey")),
        ("sessions", ("full", "freekv", "bestkey")),
        pytest.param("sessions", ("freekv-windows", "freekv-recipe"), marks=pytest.mark.slow),
        pytest.param("prefixes", ("h2o-windows", "freekv-windows", "prefixkv_paper"), marks=pytest.mark.slow),
    ],
)
def test_an_engine_says_on_a_device_what_it_says_on_the_host(
    dense: str, names: Sequence[str], folder_of: Callable[[str], Path]
) -> None:
    """In Triton's interpreter: prompts in chunks, eviction, recall, batched decoding; every page given back."""
    command = [sys.executable, "-m", "tests.device_engines", dense, *(str(folder_of(name)) for name in names)]
    outcome = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}
    )
    assert outcome.returncode == 0, outcome.stderr


@pytest.mark.usefixtures("idle")
def test_a_conversation_cannot_go_on_from_what_a_device_has_dropped(folder_of: Callable[[str], Path]) -> None:
    engine = load_on(folder_of("prefixkv_paper"), CPU)
    with pytest.raises(UsageError, match=r"cannot go on from what was kept .* policy drops tokens"):
        engine.session(mode="compressed")
    engine.session()


@pytest.mark.usefixtures("idle")
def test_what_does_not_fit_is_refused_before_it_starts(folder_of: Callable[[str], Path]) -> None:
    full = load_on(folder_of("full"), CPU, DeviceOptions(batch=2), cache_tokens=60)
    with pytest.raises(CapacityError, match="more sequences of one request"):
        full.core.reservation.check(RequestSize(n_prompt=2, max_new_tokens=5, n_sequences=3))
    with pytest.raises(CapacityError, match="the KV pool is too small") as caught:
        full.generate_batch([[5] * 40], max_new_tokens=30)
    assert "cache_tokens=70" in str(caught.value)


@pytest.mark.usefixtures("idle")
def test_contexts_are_bounded_by_the_profile(folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    text = (ROOT / "trt_kv" / "profiles" / "edge.json").read_text()
    profile = tmp_path / "short.json"
    profile.write_text(text.replace("8192]", "40]", 1).replace("2048", "20").replace("[[1, 1, 4]]", "[[1, 1, 3]]"))
    engine = load_on(folder_of("full"), CPU, DeviceOptions(profile=str(profile)))
    assert engine.core.reservation.free[0] == 3
    engine.core.reservation.check(RequestSize(n_prompt=31, max_new_tokens=10))
    with pytest.raises(CapacityError, match="longer than this engine was loaded for") as caught:
        engine.generate([5] * 32, max_new_tokens=10)
    assert "at most 40 kept and generated ones together" in str(caught.value)
    # Of 38 prompt tokens half are kept.
    evicting = load_on(folder_of("h2o"), CPU, DeviceOptions(profile=str(profile)))
    evicting.core.reservation.check(RequestSize(n_prompt=38, max_new_tokens=22))
    for n_prompt, n_new in ((38, 23), (41, 1)):
        with pytest.raises(CapacityError, match="longer than this engine was loaded for"):
            evicting.core.reservation.check(RequestSize(n_prompt=n_prompt, max_new_tokens=n_new))


@pytest.mark.usefixtures("idle")
def test_caches_on_the_host_are_admitted_by_tiers_and_working_sets(folder_of: Callable[[str], Path]) -> None:
    folder = folder_of("freekv")
    engine = load_on(folder, CPU, DeviceOptions(batch=2), cache_tokens=40, host_tokens=100)
    assert isinstance(engine.runner.tiers, DeviceRecall)
    block_tokens = engine.runner.tiers.sets.sizes.n_pages * 5
    assert block_tokens <= 40 < 2 * block_tokens
    engine.core.reservation.check(RequestSize(n_prompt=50, max_new_tokens=20))
    with pytest.raises(CapacityError, match="too few working sets") as caught:
        engine.core.reservation.check(RequestSize(n_prompt=2, max_new_tokens=5, n_sequences=2))
    assert f"cache_tokens={2 * block_tokens}" in str(caught.value)
    roomy = load_on(folder, CPU, DeviceOptions(batch=2), host_tokens=100)
    with pytest.raises(CapacityError, match="the host tier is too small") as caught:
        roomy.core.reservation.check(RequestSize(n_prompt=50, max_new_tokens=10, n_sequences=2))
    assert "host_tokens=120" in str(caught.value)
    with pytest.raises(CapacityError, match="too little memory for one working set"):
        load_on(folder, CPU, cache_tokens=10)


@pytest.mark.usefixtures("idle")
def test_who_does_what_a_refusal_says_is_served(folder_of: Callable[[str], Path]) -> None:
    """Also where working sets were made smaller than the longest prompt asks for, so that one sequence fits."""
    folder = folder_of("freekv-recipe")
    tight = load_on(folder, CPU, DeviceOptions(batch=4), cache_tokens=50)
    with pytest.raises(CapacityError, match="too few working sets") as caught:
        tight.core.reservation.check(RequestSize(n_prompt=2, max_new_tokens=5, n_sequences=4))
    sizes = {name: int(value) for name, value in re.findall(r"(cache_tokens|batch)=(\d+)", str(caught.value))}
    roomy = load_on(folder, CPU, DeviceOptions(batch=max(4, sizes["batch"])), cache_tokens=sizes["cache_tokens"])
    roomy.core.reservation.check(RequestSize(n_prompt=2, max_new_tokens=5, n_sequences=4))


@pytest.mark.usefixtures("idle")
def test_memory_that_runs_out_is_told(folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first line of what torch says: where all of it is taken, and in a step, for which some was left."""

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.\nIf reserved memory is large ...")

    engine = load_on(folder_of("full"), CPU)
    monkeypatch.setattr(engine.runner._executor, "_decoder", full)
    with pytest.raises(CapacityError, match="for this step") as caught:
        engine.generate([5, 6])
    assert "got: CUDA out of memory. Tried to allocate 1 GiB.\n  fix: lower" in str(caught.value)
    engine.runner.pool.check_integrity([])
    monkeypatch.setattr(device_loading, "DeviceKvPool", full)
    with pytest.raises(CapacityError, match="too little free memory for this engine"):
        load_on(folder_of("full"), CPU)


@pytest.mark.usefixtures("idle")
def test_scores_are_read_on_hosts_only(folder_of: Callable[[str], Path]) -> None:
    runner = load_on(folder_of("prefixkv_paper"), CPU).runner
    with pytest.raises(UsageError, match="need a KV pool on the host") as caught:
        runner.scores(runner.new_sequence())
    assert "load it on the device cpu" in str(caught.value)


@pytest.mark.usefixtures("idle")
def test_a_reservation_counts_until_its_request_ends(folder_of: Callable[[str], Path]) -> None:
    engine = load_on(folder_of("freekv"), CPU, cache_tokens=40, host_tokens=100)
    reservation, size = engine.core.reservation, RequestSize(n_prompt=20, max_new_tokens=10)
    assert reservation.reserve("first", size)
    assert not reservation.reserve("second", size)
    reservation.release("first")
    assert reservation.reserve("second", size)


def planned(manifest: Manifest, *, free_device: int, **wanted: int) -> DevicePlan:
    sizes = Wanted(**({"chunk": 32, "batch": 4} | wanted))
    return device_plan(manifest, sizes, dtype="float32", free_device=free_device, free_host=10**9)


def test_half_of_the_free_memory_holds_the_cache(folder_of: Callable[[str], Path]) -> None:
    manifest = load_manifest(folder_of("full"))
    page_bytes = 5 * 2 * (2 * 16 * 4 + 12)
    plan = planned(manifest, free_device=2 * page_bytes * 3 * 7)
    assert plan.n_pages == 3 * 7
    assert plan.largest.axes == {"N": 32, "R": 32, "B": 4, "T": -(-POSITIONS // 5)}
    assert planned(manifest, free_device=10**12).n_pages == 3 * -(-2 * 4 * POSITIONS // 5)
    assert planned(manifest, free_device=10**12, cache_tokens=52).n_pages == 3 * 11


def test_windows_leave_memory_to_the_other_layers(folder_of: Callable[[str], Path]) -> None:
    """Of a window of 9 a sequence holds up to (8 + 4 + 32) / 5 pages, and 8 sequences are planned for."""
    manifest = load_manifest(folder_of("h2o-windows"))
    page_bytes = 5 * 2 * (2 * 16 * 4 + 12)
    assert planned(manifest, free_device=10**12).n_pages == 2 * -(-8 * POSITIONS // 5) + 8 * 9
    assert planned(manifest, free_device=2 * page_bytes * (2 * 100 + 8 * 9)).n_pages == 2 * 100 + 8 * 9
    assert planned(manifest, free_device=2 * page_bytes * 3 * 7).n_pages == 3 * 7
    alone = dataclasses.replace(manifest, config=dataclasses.replace(manifest.config, windows=(9, 20, 9)))
    programs = {phase: program_of_model(alone.config, alone.policy, phase=phase, page_size=5) for phase in PHASES}
    alone = dataclasses.replace(alone, programs=programs)
    assert planned(alone, free_device=10**12).largest.table_width == -(-(19 + 4 + 32) // 5)


@pytest.mark.usefixtures("idle")
def test_requests_longer_than_a_windowed_layer_holds_are_admitted(folder_of: Callable[[str], Path]) -> None:
    engine = load_on(folder_of("freekv-windows"), CPU, DeviceOptions(batch=1), host_tokens=300)
    on_device = next(r for r in engine.core.reservation.resources if isinstance(r, CachePages))
    assert on_device.while_reading(RequestSize(n_prompt=100, max_new_tokens=20)) == -(-(8 + 4 + CHUNK) // 5)
    assert on_device.after_reading(RequestSize(n_prompt=100, max_new_tokens=20)) == -(-(8 + 4 + 1) // 5)


@pytest.mark.usefixtures("idle")
def test_the_size_that_a_refusal_names_suffices_though_windows_bound_a_layer(folder_of: Callable[[str], Path]) -> None:
    """A larger ``cache_tokens`` adds pages to the other layers only."""
    folder, size = folder_of("h2o-windows"), RequestSize(n_prompt=POSITIONS - 8, max_new_tokens=8)
    tight = load_on(folder, CPU, DeviceOptions(batch=1), cache_tokens=60)
    with pytest.raises(CapacityError, match="the KV pool is too small") as caught:
        tight.core.reservation.check(size)
    assert caught.value.got == "room for 60 tokens per layer"
    (named,) = re.findall(r"cache_tokens=(\d+)", str(caught.value))
    load_on(folder, CPU, DeviceOptions(batch=1), cache_tokens=int(named)).core.reservation.check(size)
    one_page_less = load_on(folder, CPU, DeviceOptions(batch=1), cache_tokens=int(named) - 5)
    with pytest.raises(CapacityError, match="the KV pool is too small"):
        one_page_less.core.reservation.check(size)


def test_working_sets_that_grow_with_prompts_are_sized_for_the_longest_that_fits(folder_of: Callable[[str], Path]) -> None:
    manifest = load_manifest(folder_of("freekv-recipe"))
    roomy = planned(manifest, free_device=10**9)
    assert roomy.recall is not None
    assert (roomy.recall.longest_prompt, roomy.recall.sequences) == (POSITIONS, 8)
    tight = planned(manifest, free_device=10**9, cache_tokens=50)
    assert tight.recall is not None
    assert 10 < tight.recall.longest_prompt < POSITIONS
    assert tight.recall.sequences >= 1
    assert tight.n_pages == 10  # of the layer that is read whole
    with pytest.raises(CapacityError, match="too little memory for one working set"):
        planned(manifest, free_device=1000)


def test_rows_of_codes_are_planned_for(folder_of: Callable[[str], Path]) -> None:
    """One row for pages of five tokens, of each page on the host, besides the two of bounds."""

    def least(name: str) -> int:
        manifest, low, high = load_manifest(folder_of(name)), 0, 10**9
        while low < high:
            middle = (low + high) // 2
            try:
                planned(manifest, free_device=middle)
                high = middle
            except CapacityError:
                low = middle + 1
        return low

    manifest = load_manifest(folder_of("bestkey"))
    recall = planned(manifest, free_device=10**9).recall
    assert recall is not None
    row_bytes = manifest.config.n_kv_heads * manifest.config.head_dim * 4
    assert least("bestkey") - least("freekv") == 2 * recall.host_pages * row_bytes, "half of the free memory is planned"


@pytest.mark.usefixtures("idle")
def test_what_devices_do_not_run_is_refused(
    folder_of: Callable[[str], Path], checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, freekv = folder_of("full"), folder_of("freekv")
    for folder, options, message in (
        (full, {"host_tokens": 5}, "keeps no cache on the host"),
        (freekv, {"host_tier": "file:/tmp"}, "needs a host tier in memory, not in a file"),
        (full, {"on": DeviceOptions(dense="onnxruntime", dtype="bfloat16")}, "in the type of the engine's graphs"),
        (full, {"on": DeviceOptions(dense="onnxruntime", cuda_graphs=True)}, "cannot be captured as CUDA graphs"),
        (full, {"on": DeviceOptions(cuda_graphs=True)}, "only GPUs replay"),
        (full, {"on": DeviceOptions(batch=0)}, "bad batch"),
    ):
        with pytest.raises(UsageError, match=message):
            load_on(folder, CPU, **options)
    finding = load_manifest(freekv)
    monkeypatch.setattr(device_loading, "finds_budgets", lambda _: True)
    with pytest.raises(UsageError, match="do not depend on the prompt") as caught:
        device_loading._check(freekv, finding, LoadOptions(), DeviceOptions(), CPU)
    assert "use the device cpu" in str(caught.value)


def test_devices_are_named_and_missing_ones_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_from_name("cpu") is None
    for name in ("gpu", "cuda:", "cuda:-1", "CUDA"):
        with pytest.raises(UsageError, match="unknown device"):
            device_from_name(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_from_name("cuda") == torch.device("cuda", 0)
    assert device_from_name("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="no GPU for the device 'cuda:2'"):
        device_from_name("cuda:2")
    with pytest.raises(UnknownNameError):
        DeviceOptions(dense="tensorflow")
    with pytest.raises(UnknownNameError):
        DeviceOptions(dtype="int4")


def test_options_of_devices_need_one(folder_of: Callable[[str], Path]) -> None:
    with pytest.raises(UsageError, match="dtype is for devices"):
        Engine.load(folder_of("full"), dtype="bfloat16")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_the_command_line_says_what_a_gpu_needs(command: str, folder_of: Callable[[str], Path], run: Run) -> None:
    tasks = ROOT / "examples" / "evaluate" / "tasks.jsonl"
    words = ("the old storm",) if command == "generate" else ("--tasks", tasks)
    code, _, error = run(command, folder_of("full"), *words, "--device", "cuda")
    assert code == 2
    assert "no GPU for the device 'cuda'" in error
    assert "trt-kv doctor" in error
    code, _, error = run(command, folder_of("full"), *words, "--dtype", "bfloat16")
    assert code == 2
    assert "add --device cuda" in error


@pytest.mark.gpu
@pytest.mark.parametrize("name", POLICIES)
def test_on_the_gpu_an_engine_says_what_it_says_on_the_host(name: str, folder_of: Callable[[str], Path]) -> None:
    check(folder_of(name), torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.skipif(CUDA not in ort.get_available_providers(), reason="needs onnxruntime-gpu")
@pytest.mark.parametrize("name", ["prefixkv_paper", "freekv"])
def test_on_the_gpu_onnxruntime_runs_the_dense_parts(name: str, folder_of: Callable[[str], Path]) -> None:
    check(folder_of(name), torch.device("cuda", 0), DeviceOptions(dense="onnxruntime"))


@pytest.mark.gpu
def test_on_the_gpu_half_precision_and_the_default_sizes_serve_requests(folder_of: Callable[[str], Path]) -> None:
    """Memory that is planned by what is free; weights that are converted; CUDA graphs where they are the default."""
    for name in ("prefixkv_paper", "freekv"):
        with Engine.load(folder_of(name), device="cuda", dtype="bfloat16", chunk=CHUNK) as engine:
            results = engine.generate_batch(prompts(), max_new_tokens=N_NEW)
            assert all(one.error is None and len(one.token_ids) <= N_NEW for one in results)
            assert "CUDA graphs" in engine.runner.description


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["prefixkv_paper", "freekv"])
def test_on_the_gpu_the_command_line_generates_and_evaluates(
    name: str, folder_of: Callable[[str], Path], run: Run, tmp_path: Path
) -> None:
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"prompt": "the old storm", "expected": "came over"}\n' * 3)
    words = (folder_of(name), "--device", "cuda", "--profile", "edge")
    code, out, error = run("generate", *words, "the old storm", "--max-new-tokens", "4")
    assert code == 0, error
    assert "run by torch" in error
    code, out, error = run("evaluate", *words, "--tasks", tasks, "--batch-size", "2")
    assert code == 0, error
    assert "on cuda" in out
