"""Engines whose cache stays on the host: built, loaded, run and refused as a user does it."""

import dataclasses
import json
import re
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines import CHUNK, build_for_test, interrupted_at_line, random_ids, recipe_for
from trt_kv.cli import main
from trt_kv.errors import CapacityError, RecallError, UsageError
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.policies import policy_from_name
from trt_kv.policy_settings import differences, policy_with, setting_as_text, settings_from_text
from trt_kv.runtime.backends.host.recall import driver as streamed
from trt_kv.runtime.backends.host.recall import layer as layer_streams
from trt_kv.runtime.backends.host.recall import working_set
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.in_place import RecallInPlace
from trt_kv.runtime.cache import page_pool, tiered_sequence
from trt_kv.runtime.cache import sequence as sequence_cache
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.request import Request
from trt_kv.runtime.reservation import RequestSize
from trt_kv.runtime.scheduler import StepPlan
from trt_kv.runtime.trace import Trace

SETTINGS: dict[str, Any] = {"tokens": 40, "sinks": 5, "recent": 10, "tau": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, small_checkpoint_folder: Path) -> Path:
    """FreeKV for the small random checkpoint (3 layers), pages of 5 tokens; layer 0 stays on the device."""
    policy = policy_with(policy_from_name("freekv"), SETTINGS | {"exempt_layers": (0,)})
    request = EngineRequest(checkpoint=open_checkpoint(small_checkpoint_folder), policy=policy, page_size=5)
    return build_for_test(request, tmp_path_factory.mktemp("engines") / "freekv")


@pytest.fixture(scope="module")
def recipe_folder(tmp_path_factory: pytest.TempPathFactory, small_checkpoint_folder: Path) -> Path:
    """The same with working sets from a PrefixKV recipe."""
    checkpoint = open_checkpoint(small_checkpoint_folder)
    policy = policy_with(policy_from_name("freekv"), {"budget": "recipe", "kept": 0.5, "sinks": 5, "recent": 10, "tau": 0.5})
    request = EngineRequest(
        checkpoint=checkpoint, policy=policy, recipe=recipe_for(checkpoint, (0.7, 0.3, 0.5), budget=0.5), page_size=5
    )
    return build_for_test(request, tmp_path_factory.mktemp("engines") / "recipe")


def load(folder: Path, **options: Any) -> Engine:
    """With the host tier in a file, from which pages are streamed."""
    sizes = {"cache_tokens": 400, "host_tokens": 1000, "chunk": CHUNK, "n_threads": 1}
    return Engine.load(folder, **(sizes | {"host_tier": f"file:{tempfile.gettempdir()}"} | options))


@pytest.fixture
def engine(folder: Path) -> Iterator[Engine]:
    with load(folder) as engine:
        yield engine


def assert_nothing_leaked(engine: Engine) -> None:
    assert isinstance(engine.runner.tiers, StreamedRecall | RecallInPlace)
    engine.runner.pool.check_integrity([])
    engine.runner.tiers.host.check_integrity([])


def test_a_file_tier_and_a_batch_give_the_tokens_of_one_alone_in_memory(folder: Path, tmp_path: Path) -> None:
    with load(folder, host_tier="ram") as in_memory:
        assert isinstance(in_memory.runner.tiers, RecallInPlace)
        prompts = [random_ids(in_memory, n, seed=n) for n in (100, 7, 61)]
        alone = [in_memory.generate(prompt, max_new_tokens=20) for prompt in prompts]
        assert in_memory.generate_batch(prompts, max_new_tokens=20) == alone
        corrected_LK = in_memory.runner.tiers.statistics.corrected_LK.copy()
        assert_nothing_leaked(in_memory)
    with load(folder, host_tier=f"file:{tmp_path}") as in_file:
        for results in (
            in_file.generate_batch(prompts, max_new_tokens=20),
            [in_file.generate(p, max_new_tokens=20) for p in prompts],
        ):
            assert [result.token_ids for result in results] == [result.token_ids for result in alone]
        assert isinstance(in_file.runner.tiers, StreamedRecall)
        assert (in_file.runner.tiers.statistics.corrected_LK == corrected_LK).all()
        assert_nothing_leaked(in_file)
    assert list(tmp_path.iterdir()) == []


def test_a_refusal_in_memory_asks_for_what_is_enough(folder: Path) -> None:
    """Both for the tier, and for the pool of the layers that do not recall."""
    sizes = {"cache_tokens": 10, "host_tokens": 50}
    for expected in ("cache_tokens", "host_tokens", None):
        with load(folder, host_tier="ram", **sizes) as engine:
            prompt = random_ids(engine, 90, seed=0)
            if expected is None:
                assert len(engine.generate(prompt, max_new_tokens=30).token_ids) == 30
                continue
            with pytest.raises(CapacityError, match=expected) as refusal:
                engine.generate(prompt, max_new_tokens=30)
            (asked_for,) = re.findall(rf"{expected}=(\d+)", str(refusal.value))
            sizes[expected] = int(asked_for)
            assert_nothing_leaked(engine)


def test_results_tell_what_the_device_held(engine: Engine) -> None:
    """All of the exempt layer; of the others the budget and the slots that pages arrive in."""
    result = engine.generate(random_ids(engine, 110, seed=1), max_new_tokens=10)
    n_sinks, n_newest = 1, 3
    n_chosen = 40 // 5 - n_sinks - n_newest
    working_set = (n_sinks + n_newest + n_chosen + 1) * 5
    assert result.kv_tokens == (119, working_set, working_set)


def test_working_sets_follow_a_recipe(recipe_folder: Path) -> None:
    with load(recipe_folder) as engine:
        result = engine.generate(random_ids(engine, 120, seed=1), max_new_tokens=5)
        budgets = [int(120 * share) for share in (0.7, 0.3, 0.5)]
        for held, budget in zip(result.kv_tokens, budgets, strict=True):
            assert budget - 5 <= held <= 1.25 * budget + 5


def test_a_request_that_fits_neither_tier_is_refused_before_it_starts(folder: Path) -> None:
    with load(folder, host_tokens=100) as engine:
        prompt = random_ids(engine, 120, seed=0)
        with pytest.raises(CapacityError, match="host tier is too small") as caught:
            engine.generate(prompt, max_new_tokens=11)
        assert "host_tokens=130" in str(caught.value)
        engine.generate(prompt[:90], max_new_tokens=10)
        assert_nothing_leaked(engine)
    with load(folder, cache_tokens=100) as engine, pytest.raises(CapacityError, match="KV pool is too small"):
        engine.core.reservation.check(RequestSize(n_prompt=120, max_new_tokens=10, n_sequences=3))


def test_the_tiers_that_a_refusal_asks_for_are_enough(folder: Path) -> None:
    """Loaded as the two refusals say, and no larger, the engine serves the batch to its end."""
    sizes = {"cache_tokens": 50, "host_tokens": 50}
    results: list[Generation] = []
    for _ in range(3):
        with load(folder, **sizes) as engine:
            prompts = [random_ids(engine, n, seed=n) for n in (95, 14, 60)]
            try:
                results = engine.generate_batch(prompts, max_new_tokens=30)
            except CapacityError as refusal:
                (asked_for,) = re.findall(r"(cache_tokens|host_tokens)=(\d+)", str(refusal))
                sizes[asked_for[0]] = int(asked_for[1])
            assert_nothing_leaked(engine)
    assert [len(result.token_ids) for result in results] == [30, 30, 30]


def test_a_request_whose_pages_are_lost_fails_and_the_others_go_on(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [random_ids(engine, n, seed=n) for n in (90, 120, 70)]
    expected = [engine.generate(prompt, max_new_tokens=15).token_ids for prompt in prompts]
    assert isinstance(engine.runner.tiers, StreamedRecall)
    host = engine.runner.tiers.host
    read, lost = host.read_heads, set[int]()

    def read_unless_lost(pages_M: np.ndarray, *to: Any) -> None:
        if lost & set(pages_M.tolist()):
            raise OSError("the disk is gone")
        read(pages_M, *to)

    monkeypatch.setattr(host, "read_heads", read_unless_lost)
    original = engine.runner.run

    def run(plan: StepPlan[Request]) -> Any:
        logits = original(plan)
        if plan.reads_last and plan.end == 120:
            lost.update(plan.requests[0].sequence.pages_in(host))
        if any(request.sequence.failure for request in plan.requests):
            lost.clear()  # its pages are others' next
        return logits

    monkeypatch.setattr(engine.runner, "run", run)
    results = engine.generate_batch(prompts, max_new_tokens=15)
    assert [result.finish_reason for result in results] == ["length", "error", "length"]
    assert "the disk is gone" in str(results[1].error)
    assert results[0].token_ids == expected[0]
    assert results[2].token_ids == expected[2]
    assert results[1].token_ids == expected[1][: len(results[1].token_ids)]
    assert_nothing_leaked(engine)
    with pytest.raises(RecallError, match="the disk is gone"):
        engine.generate(prompts[1], max_new_tokens=15)
    stream = engine.stream(prompts[1], max_new_tokens=15)
    with pytest.raises(RecallError, match="the disk is gone"):
        list(stream)
    lost.clear()
    monkeypatch.setattr(engine.runner, "run", original)
    assert engine.generate(prompts[1], max_new_tokens=15).token_ids == expected[1]
    assert_nothing_leaked(engine)


def test_an_abandoned_stream_gives_everything_back(engine: Engine) -> None:
    stream = engine.stream(random_ids(engine, 100, seed=3), max_new_tokens=20)
    next(stream)
    stream.close()
    assert_nothing_leaked(engine)


def test_ctrl_c_in_the_middle_of_a_step_loses_no_page_and_leaves_nothing_waiting(engine: Engine) -> None:
    """At any line of the bookkeeping of either tier; the same request then gives what it would have given."""
    prompt = random_ids(engine, CHUNK + 20, seed=1)
    expected = engine.generate(prompt, max_new_tokens=4)
    number = 0
    while interrupted_at_line(
        number,
        [streamed, layer_streams, working_set, page_pool, tiered_sequence, sequence_cache],
        lambda: engine.generate(prompt, max_new_tokens=4),
        only="attend read_prompt before_attention _recall_at_once recall_ahead join _submit _write_behind append "
        "make_room place block_with attended allocate _grow_tables",
    ):
        assert_nothing_leaked(engine)
        number += 11
    assert number > 1000
    assert engine.generate(prompt, max_new_tokens=4) == expected


def test_closing_stops_the_threads(folder: Path) -> None:
    before = threading.active_count()
    with load(folder) as engine:
        engine.generate(random_ids(engine, 90, seed=0), max_new_tokens=5)
        assert threading.active_count() > before
    assert threading.active_count() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"host_tier": "disk"}, "unknown host tier"),
        ({"host_tier": "file:/nowhere/at/all"}, "file of the host tier cannot be created"),
        ({"host_tier": "mmap:/nowhere/at/all"}, "file of the host tier cannot be created"),
        ({"host_tokens": 0}, "host_tokens"),
    ],
)
def test_bad_options_are_refused(folder: Path, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        load(folder, **options)


def test_an_engine_without_a_host_tier_takes_none(small_folder: Path) -> None:
    with pytest.raises(UsageError, match="keeps no cache on the host"):
        Engine.load(small_folder, host_tier="ram")


def test_a_trace_tells_what_ran_when(folder: Path) -> None:
    trace = Trace()
    with load(folder, trace=trace) as engine:
        engine.generate(random_ids(engine, 100, seed=0), max_new_tokens=5)
    events = trace.to_json()["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    names = {span["name"] for span in spans}
    assert names >= {"prefill step", "decode step", "attention", "join", "choose pages", "recalling pages", "storing pages"}
    named = {event["tid"]: event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {named[span["tid"]] for span in spans if span["name"] == "attention"} == {"MainThread"}
    assert set(named.values()) <= {"MainThread", "recall_0", "recall_1"}
    assert all(span["dur"] >= 0 and span["ts"] >= 0 for span in spans)


def test_the_command_line_from_build_to_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """256 tokens of pages of 8 find a fact that stands far back; the device held about half of the tokens."""
    out, trace = tmp_path / "freekv", tmp_path / "trace.json"
    settings = ["tokens=160", "sinks=8", "recent=32"]
    assert main(["build", "--policy", "freekv", "--set", *settings, "--page-size", "8", "--out", str(out)]) == 0
    assert main(["inspect", str(out)]) == 0
    said = capsys.readouterr().out
    assert "every token stays in host memory" in said
    assert "--page-size 8" in said
    question = Path(__file__).parent.parent / "examples" / "late_question.txt"
    words = ["generate", str(out), "--prompt-file", str(question), "--max-new-tokens", "8"]
    assert main([*words, "--host-tier", f"file:{tmp_path}", "--trace", str(trace)]) == 0
    spoken = capsys.readouterr()
    assert spoken.out.startswith(" code of trent is 5 3 7")
    assert "recalled" in spoken.err
    assert json.loads(trace.read_text())["traceEvents"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["freekv", "trace.json"]
    assert main([*words, "--host-tier", f"file:{trace}"]) == 2
    assert "nothing was overwritten" in capsys.readouterr().err
    assert main([*words, "--trace", str(tmp_path / "missing" / "trace.json")]) == 2
    assert main(["build", "--policy", "freekv", "--page-size", "0", "--out", str(tmp_path / "none")]) == 2


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"tau": 3.0}, "tau is out of range"),
        ({"softmax_scale": 0.0}, "softmax_scale is out of range"),
        ({"recent": 0}, "newest token"),
        ({"tokens": 100}, "includes sinks and recent"),
        ({"decode": "rank"}, "applies only to eviction"),
        ({"recent_share": 0.5}, "applies only to eviction"),
        ({"heads": "each"}, "computed from attention"),
        ({"group_pooling": "max_raw", "softmax_scale": 0.5}, "would be ignored"),
        ({"budget": "unimetric", "metric_row": "scores"}, "metric_row"),
        ({"budget": "unimetric", "metric_order": "ranking"}, "accumulates the last query"),
    ],
)
def test_combinations_that_mean_nothing_are_refused_with_the_reason(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        policy_with(policy_from_name("freekv"), settings)
    with pytest.raises(UsageError, match=r"would be ignored"):
        policy_with(policy_from_name("prefixkv_paper"), {"tau": 0.5})


def test_pages_are_ranked_exactly_where_the_cache_is_on_the_host() -> None:
    for name, residency in (("prefixkv_paper", "host"), ("freekv", "dropped")):
        with pytest.raises(UsageError, match="combines score"):
            dataclasses.replace(policy_from_name(name), residency=residency)


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": "recipe", "kept": 0.3, "page_summary": "deviation", "group_pooling": "mean_raw"},
        {"budget": "unimetric", "threshold": 0.05},
        {"budget": "uniform", "kept": 0.2, "drift": "calibrated"},
        {"tokens": 512, "tau": 0.9, "exempt_layers": (0, 1)},
        {"page_summary": "codes", "group_pooling": "max_raw"},
        {"score": "mass", "budget": "uniform"},
    ],
)
def test_the_command_that_makes_an_engine_again_is_taken(settings: dict[str, Any]) -> None:
    """What differs from the preset, written down and read back, is the same policy."""
    preset = policy_from_name("freekv")
    policy = policy_with(preset, settings)
    texts = [setting_as_text(name, value) for name, value in differences(policy, preset).items()]
    assert policy_with(preset, settings_from_text(texts)) == policy


@pytest.mark.parametrize("page_size", [5, 32])
def test_the_default_sizes_hold_a_working_set_of_a_model_with_few_positions(
    page_size: int, tmp_path: Path, small_checkpoint_folder: Path
) -> None:
    """FreeKV's own sinks and newest tokens are twice as many as the 128 positions of the model."""
    checkpoint = open_checkpoint(small_checkpoint_folder)
    request = EngineRequest(checkpoint=checkpoint, policy=policy_from_name("freekv"), page_size=page_size)
    with Engine.load(build_for_test(request, tmp_path / "freekv"), n_threads=1) as engine:
        for n_prompt in (3, 120):
            assert len(engine.generate(random_ids(engine, n_prompt, seed=n_prompt), max_new_tokens=3).token_ids) == 3
