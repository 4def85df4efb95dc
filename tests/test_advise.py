"""``trt-kv advise`` plans with the runtime's own arithmetic, and real engines take up what it says."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engines import Run, build_for_test
from tests.serving import engine_under, small_policy
from trt_kv.calibration.pareto_plot import picture_from_policies
from trt_kv.errors import UsageError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.manifest import KV_DTYPES, load_manifest
from trt_kv.pipeline import AdviceRequest, MeasuredPolicy, advise
from trt_kv.pipeline.advice_model import open_subject, weight_bytes
from trt_kv.pipeline.advice_probe import CHUNK
from trt_kv.pipeline.advice_tasks import is_on_front, recommended
from trt_kv.pipeline.advice_time import kind_of, prompt_times, token_times
from trt_kv.pipeline.advise import MOST_BATCH, largest
from trt_kv.pipeline.plans import WeightPlan
from trt_kv.policies import policy_from_name, policy_names
from trt_kv.program import PHASES, program_of, program_of_model
from trt_kv.runtime.backends.host.recall.in_place import RecallInPlace
from trt_kv.runtime.backends.host.reservation import HostSizing
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.loading import MAX_SEQUENCES
from trt_kv.runtime.model_runner import DEFAULT_CHUNK
from trt_kv.runtime.probes.layers import LayerProbe, LayerShape
from trt_kv.runtime.reservation import RequestSize
from trt_kv.weight_index import load_weight_index

POLICIES = ("full", "prefixkv_paper", "h2o", "refreekv", "freekv", "quest")
WITHIN = 0.05
"""Of the bytes that a real load takes up."""


def sizing_of(engine: Engine, kv_dtype: str = "float32") -> HostSizing:
    manifest = engine.manifest
    return HostSizing(
        manifest.config,
        manifest.applied_policy,
        manifest.programs,
        page_size=manifest.page_size,
        kv_dtype=kv_dtype,
        chunk=engine.runner.chunk,
    )


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_planned_bytes_are_those_of_the_pools_that_are_allocated(small_engine: Engine, policy: str, kv_dtype: str) -> None:
    with engine_under(small_engine, small_policy(policy), kv_dtype=kv_dtype) as engine:
        sizing, pool, tiers = sizing_of(engine, kv_dtype), engine.runner.pool, engine.runner.tiers
        assert sizing.page_bytes == pool.page_bytes
        if tiers is not None:
            assert isinstance(tiers, RecallInPlace)
            tier_bytes = tiers.host.page_bytes * tiers.host.n_pages + tiers.summaries.nbytes + tiers.last_query.nbytes
            assert sizing.tier_page_bytes * tiers.host.n_pages == tier_bytes


def test_constants_that_are_written_twice_agree() -> None:
    assert (MOST_BATCH, CHUNK) == (MAX_SEQUENCES, DEFAULT_CHUNK)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_engine_loaded_as_advised_admits_exactly_what_was_planned(small_engine: Engine, policy: str) -> None:
    with engine_under(small_engine, small_policy(policy)) as engine:
        sizing, size = sizing_of(engine), RequestSize(n_prompt=131, max_new_tokens=12)
        planned = sizing.of(size, 3)
        counted = [
            resource.while_reading(size) + 2 * resource.after_reading(size) for resource in engine.core.reservation.resources
        ]
        assert [planned.pool_pages, planned.tier_pages][: len(counted) - 1] == counted[1:]
    options: dict[str, Any] = dict(sizing.options(planned))
    with engine_under(small_engine, small_policy(policy), **options) as engine:
        reservation = engine.core.reservation
        for key in range(3):
            assert reservation.reserve(key, size)
            reservation.finish_reading(key)
    for option, n_tokens in options.items():
        if option == "cache_tokens" and planned.pool_pages == 0:
            continue
        less = options | {option: max(1, (n_tokens - engine.manifest.page_size) // 3)}
        with engine_under(small_engine, small_policy(policy), **less) as engine:
            assert not all(_is_admitted(engine, key, size) for key in range(3))


def _is_admitted(engine: Engine, key: int, size: RequestSize) -> bool:
    reservation = engine.core.reservation
    is_reserved = reservation.reserve(key, size)
    if is_reserved:
        reservation.finish_reading(key)
    return is_reserved


@pytest.mark.parametrize("policy", ["full", "prefixkv_paper", "freekv"])
def test_no_page_more_is_used_than_planned(small_engine: Engine, policy: str) -> None:
    """And of a whole cache not one less."""
    n_prompt, n_new = 97, 12
    with engine_under(small_engine, small_policy(policy)) as engine:
        planned = sizing_of(engine).of(RequestSize(n_prompt=n_prompt, max_new_tokens=n_new))
        pools = [engine.runner.pool, *([engine.runner.tiers.host] if engine.runner.tiers is not None else [])]
        most = [0, 0]
        request = engine.submit(list(range(3, 3 + n_prompt)), max_new_tokens=n_new, ignore_eos=True, min_tokens=n_new)

        def watched() -> bool:
            for index, pool in enumerate(pools):
                most[index] = max(most[index], pool.n_pages - pool.n_free)
            return request.is_finished

        engine.core.wait(watched)
    assert most[0] <= planned.pool_pages
    assert most[1] <= planned.tier_pages
    if policy != "prefixkv_paper":
        assert most[0] + most[1] >= planned.pool_pages + planned.tier_pages - engine.manifest.config.n_layers


def test_resident_memory_grows_by_what_was_planned(full_folder: Path) -> None:
    """Of a process of its own, in pages of 4 KiB (huge ones are used up by 2 MiB), after the steps have had their buffers. All
    requests are read before the first one ends.
    """
    n_prompt, n_new, batch = 1500, 16, 3
    code = f"""
import json
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.probes.engine_steps import resident_bytes
engine = Engine.load({str(full_folder)!r}, cache_tokens={batch * (n_prompt + 64)}, prefix_cache=False)
params = dict(max_new_tokens={n_new}, min_tokens={n_new}, ignore_eos=True, temperature=0.0)
engine.generate_batch([list(range(3, 203)) for _ in range({batch})], **params)
engine.generate(list(range(3, 203)) * 3, **params)
before = resident_bytes()
prompts = [[3 + (7 * i + j) % 200 for i in range({n_prompt})] for j in range({batch})]
engine.generate_batch(prompts, **params)
print(json.dumps(resident_bytes() - before))
"""
    environment = os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    grown = json.loads(done.stdout)
    manifest = load_manifest(full_folder)
    sizing = HostSizing(
        manifest.config, manifest.applied_policy, manifest.programs, page_size=manifest.page_size, kv_dtype="float32"
    )
    whole, before = (sizing.of(RequestSize(n_prompt=n, max_new_tokens=n_new), batch) for n in (n_prompt, 200))
    planned = whole.n_bytes - before.n_bytes
    assert abs(grown - planned) < WITHIN * planned


@pytest.mark.parametrize("quant", ["none", "int4", "int8"])
def test_planned_weights_are_those_of_a_built_engine(quant: str, small_checkpoint_folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_checkpoint_folder)
    quantization = WeightPlan(quant=quant).quantization
    request = EngineRequest(checkpoint=checkpoint, policy=policy_from_name("full"), quantization=quantization)
    folder = build_for_test(request, tmp_path / "engine")
    index = load_weight_index(folder / "graphs", checkpoint.config.tensor_shapes())
    assert weight_bytes(checkpoint, quant) == sum(n_bytes for *_, n_bytes, _ in index.places())
    stored = sum(file.stat().st_size for file in (folder / "graphs").glob("*.data"))
    subject = open_subject(str(folder), page_size=None, kv_dtype=None, on_note=lambda _: None)
    assert [(size.quant, size.n_bytes) for size in subject.weights] == [(quant, stored)]


def test_the_largest_context_and_batch_fit_and_one_more_does_not(full_folder: Path) -> None:
    def asked(**changed: Any) -> Any:
        request = AdviceRequest(model=str(full_folder), context=2000, batch=3, memory_bytes=250 * 2**20, measure=False)
        return advise(dataclasses.replace(request, **changed)).policies

    found = asked(policies=("prefixkv_paper", "freekv"))
    assert [policy.name for policy in found] == ["full", "prefixkv_paper", "freekv"]
    assert [policy.is_engine for policy in found] == [True, False, False]
    whole = found[0]
    total = whole.total_bytes
    exactly = {"memory_bytes": total + 2**25, "policies": ("full",)}
    (policy,) = asked(**exactly)
    assert 2000 < policy.largest_context < 8192
    assert 3 < policy.largest_batch < MOST_BATCH


@pytest.mark.parametrize("name", policy_names())
def test_the_time_of_every_policy_depends_on_known_attributes(name: str) -> None:
    for phase in PHASES:
        program = program_of(policy_from_name(name), phase=phase, n_layers=3, scale=0.5, page_size=8)
        assert all(kind_of(nodes) for nodes in program)


def test_a_layer_with_predicted_scores_is_timed_with_weights_for_all_its_heads(bundled_checkpoint: Checkpoint) -> None:
    config = bundled_checkpoint.config
    programs = {phase: program_of_model(config, policy_from_name("kvzap"), phase=phase, page_size=8)[0] for phase in PHASES}
    shape = LayerShape(
        n_layers=2,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        kv_dtype="float32",
        page_size=8,
        chunk=64,
        n_threads=1,
    )
    assert LayerProbe(shape, programs).prompt_ms(100) > 0.0


def test_bisection_finds_the_last_that_fits() -> None:
    for last in range(4, 30):
        assert largest(4, 29, lambda n, last=last: n <= last) == last  # type: ignore[misc]
    assert largest(4, 29, lambda _: False) == 0
    assert largest(5, 4, lambda _: True) == 0


def test_times_at_the_measured_points_are_the_measured_ones() -> None:
    """Two lengths determine the times of a layer, also of one that recalls."""
    plain = program_of(policy_from_name("full"), phase="decode", n_layers=1, scale=1.0, page_size=32)[0]
    prefill = program_of(policy_from_name("snapkv"), phase="prefill", n_layers=1, scale=1.0, page_size=32)[0]
    recall = program_of(policy_from_name("freekv"), phase="decode", n_layers=1, scale=1.0, page_size=32)[0]
    assert token_times(plain, [1000, 3000], [1.5, 3.5], page_size=32, per_attended=0.0) == pytest.approx((0.5, 0.001, 0.0))
    a, b = prompt_times(prefill, [1000, 2000], [1000 * 2 + 1e6 * 3, 2000 * 2 + 4e6 * 3])
    assert (a, b) == pytest.approx((2.0, 3.0))
    constant, per_attended, per_cached = token_times(recall, [1024, 3072], [2.0, 4.0], page_size=32, per_attended=0.001)
    assert per_attended == 0.001
    assert constant >= 0
    assert constant + 0.001 * 2048 + per_cached * 3072 == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"context": 100}, "no room for a prompt"),
        ({"batch": 0}, "--batch is below 1"),
        ({"batch": 10_000}, "at most 256"),
        ({"quant": "int3"}, "unknown quantisation"),
        ({"kv_dtype": "int3"}, "unknown KV cache type"),
        ({"policies": ("lru",)}, "unknown policy"),
    ],
)
def test_impossible_requests_are_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        AdviceRequest(model="llama3", **changed)


def test_what_does_not_fit_an_engine_is_refused(full_folder: Path) -> None:
    request = AdviceRequest(model=str(full_folder), measure=False)
    refused = {
        "quant": ("int4", "weights that it was built with"),
        "context": (9000, "positions"),
        "page_size": (7, "page size"),
    }
    for name, (value, said) in refused.items():
        changed: dict[str, Any] = {name: value}
        with pytest.raises(UsageError, match=said):
            advise(dataclasses.replace(request, **changed))


def test_the_command_prints_a_table_and_json(run: Run) -> None:
    asked = ("--context", "1k", "--batch", "2", "--memory", "0.2GiB", "--policy", "full", "--policy", "freekv", "--no-measure")
    code, out, _ = run("advise", "llama3", *asked)
    assert code == 0
    assert "2 requests at once of 1,024 tokens" in out
    assert "freekv" in out
    code, out, _ = run("advise", "llama3", *asked, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["format"] == "trt-kv-advice"
    assert [policy["name"] for policy in found["policies"]] == ["full", "freekv"]
    assert found["context"] == 1024
    assert found["memory_bytes"] == int(0.2 * 2**30)
    assert run("advise", "llama3", "--memory", "much")[0] == 2


def on_tasks(name: str, accuracy: float, high: float, n_bytes: int, seconds: float, *, fits: bool = True) -> MeasuredPolicy:
    return MeasuredPolicy(
        name=name,
        n_tasks=20,
        accuracy=accuracy,
        accuracy_low=accuracy / 2,
        accuracy_high=high,
        cache_bytes=n_bytes,
        seconds_per_task=seconds,
        fits=fits,
    )


def test_the_smallest_cache_is_recommended_whose_interval_reaches_the_best_accuracy(tmp_path: Path) -> None:
    full, half, tenth = (
        on_tasks("full", 0.8, 0.9, 100, 1.0),
        on_tasks("half", 0.75, 0.86, 50, 0.8),
        on_tasks("tenth", 0.2, 0.4, 10, 0.7),
    )
    worse = on_tasks("worse", 0.7, 0.82, 60, 0.9)
    everyone = [full, half, tenth, worse]
    assert recommended(everyone) == "half"
    assert [policy.name for policy in everyone if is_on_front(policy, everyone)] == ["full", "half", "tenth"]
    assert recommended([dataclasses.replace(half, fits=False), full]) == "full"
    assert recommended([dataclasses.replace(half, fits=False)]) is None
    twins = [half, dataclasses.replace(half, name="twin")]
    assert all(is_on_front(policy, twins) for policy in twins)
    picture_from_policies(everyone, tmp_path / "policies.png", title="a test")
    assert (tmp_path / "policies.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_tasks_give_a_table_a_picture_and_a_recommendation(run: Run, tmp_path: Path) -> None:
    tasks = Path(__file__).parent.parent / "examples/evaluate/tasks.jsonl"
    words = (
        "--tasks",
        tasks,
        "--limit",
        "2",
        "--policy",
        "full",
        "--policy",
        "streamingllm",
        "--no-measure",
        "--out",
        tmp_path / "a",
    )
    for _ in range(2):  # the second time everything is there
        code, out, errors = run("advise", "llama3", "--context", "2k", *words)
        assert code == 0, errors
        assert "recommended" in out
        assert "2 tasks" in out
    assert {"advice.png", "full", "full.json", "streamingllm"} <= {path.name for path in (tmp_path / "a").iterdir()}


@pytest.mark.slow
def test_a_probe_gives_every_policy_times(full_folder: Path) -> None:
    advice = advise(AdviceRequest(model=str(full_folder), context=1024))
    assert advice.machine.gb_per_s is not None
    assert advice.machine.step_ms is not None
    assert all(policy.token_ms is not None and not policy.is_lower_bound for policy in advice.policies[:2])
