"""The benchmark beside other engines: runners are alone and bounded, placed caches are like real ones, aims are judged."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import psutil
import pytest
import torch

from benchmarks.peers import __main__ as command
from benchmarks.peers import measure, subjects
from benchmarks.peers.aims import targets_of
from benchmarks.peers.document import with_tables
from benchmarks.peers.history import OUT_OF_TIME, History
from benchmarks.peers.measure import Plan, Run
from benchmarks.peers.page import section
from benchmarks.peers.picture import draw
from benchmarks.peers.protocol import Answer, Job, Refusal, Setup, prompt_ids
from benchmarks.peers.results import lines_of
from benchmarks.peers.rows import ROWS, Prepared
from benchmarks.peers.runners.our_requests import request_of
from benchmarks.peers.runners.placed_caches import PlacedCaches
from benchmarks.peers.shape_checkpoint import (
    BFLOAT16,
    SHAPES,
    gguf_name,
    random_tensor,
    tokenizer_of_repository,
    write_checkpoint,
    write_gguf,
)
from benchmarks.peers.worker import Measured, Worker
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.plugins.kv_rows import load
from trt_kv.presets import preset
from trt_kv.runtime.engine import Engine

TINY = SHAPES["tiny"]
JOB = Job(context=32, n_tokens=3, seed=7)

linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are Linux's")


def worker(tmp_path: Path) -> Worker:
    return Worker(Path(sys.executable), "tests.echo_runner", log=tmp_path / "log", environment={})


def set_up(started: Worker, model: str = "") -> tuple[dict[str, Any], float] | Refusal:
    return started.set_up(Setup(model=model, threads=1, context=64), within_s=60)


@linux
def test_a_runner_answers_and_is_stopped_in_between(tmp_path: Path) -> None:
    with worker(tmp_path) as started:
        facts = set_up(started)
        assert isinstance(facts, tuple)
        assert facts[0] == {"version": "1"}
        process = psutil.Process(started.pid)
        while process.status() != psutil.STATUS_STOPPED:  # the signal is on its way
            time.sleep(0.01)
        outcome = started.run(JOB, within_s=60)
        assert isinstance(outcome, Measured)
        assert outcome.answer == Answer(first_token_s=0.5, token_ms=[7.0, 7.0, 7.0])
        assert outcome.peak_bytes > 2**20
        refused = started.run(Job(context=32, n_tokens=3, seed=7, synthetic=True), within_s=60)
        assert refused == Refusal(why="CannotDoError: it reads every prompt")
        assert isinstance(started.run(JOB, within_s=60), Measured)


@linux
@pytest.mark.parametrize(("model", "why"), [("slow", "longer than 0 s"), ("dies", "ended with 3")])
def test_a_runner_that_dawdles_or_dies_refuses_from_then_on(tmp_path: Path, model: str, why: str) -> None:
    with worker(tmp_path) as started:
        set_up(started, model)
        first, second = (started.run(JOB, within_s=0.2 if model == "slow" else 60) for _ in range(2))
        assert isinstance(first, Refusal)
        assert why in first.why
        assert isinstance(second, Refusal)


def test_a_model_that_cannot_be_loaded_is_refused(tmp_path: Path) -> None:
    with worker(tmp_path) as started:
        assert set_up(started, "broken") == Refusal(why="CannotDoError: no such model")


def test_no_two_requests_have_the_same_prompt() -> None:
    jobs = [Job(context=n, n_tokens=1, seed=seed) for n in (40, 50) for seed in range(3)]
    prompts = {tuple(prompt_ids(job, 1400)[:10]) for job in jobs}
    assert len(prompts) == len(jobs)
    assert prompt_ids(jobs[0], 1400) == prompt_ids(jobs[0], 1400)
    assert all(300 <= token < 1100 for prompt in prompts for token in prompt)


def test_a_written_shape_is_a_checkpoint(tmp_path: Path) -> None:
    write_checkpoint(TINY, tmp_path / "hf", tokenizer_of_repository())
    checkpoint = open_checkpoint(tmp_path / "hf")
    name = "model.layers.1.mlp.up_proj.weight"
    expected = load(random_tensor(name, (TINY["intermediate_size"], TINY["hidden_size"])))
    np.testing.assert_array_equal(checkpoint.tensor(name).float().numpy(), expected)
    assert checkpoint.tensor(name).dtype == torch.bfloat16


def test_its_gguf_file_holds_the_same_weights(tmp_path: Path) -> None:
    vocabulary = preset("smollm2").location
    if vocabulary is None:
        pytest.skip(preset("smollm2").install_command)
    write_gguf(TINY, tmp_path / "tiny.gguf", vocabulary)
    checkpoint = open_checkpoint(tmp_path / "tiny.gguf")
    for name in ("model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"):
        values = checkpoint.tensor(name).float().numpy()
        exact = load(random_tensor(name, values.shape))
        # Q4_0 rounds to sixteenths of the largest value of 32.
        largest = np.abs(exact.reshape(len(exact), -1, 32)).max(-1, keepdims=True)
        assert (np.abs(values - exact).reshape(len(exact), -1, 32) <= largest / 7).all()
    assert gguf_name("model.norm.weight") == "output_norm.weight"


def test_a_bfloat16_tensor_depends_on_its_name_alone() -> None:
    assert BFLOAT16.name == "bfloat16"
    np.testing.assert_array_equal(random_tensor("a", (4, 8)), random_tensor("a", (4, 8)))
    assert (random_tensor("a", (4, 8)) != random_tensor("b", (4, 8))).any()


SIDES = [
    ("full", None),
    *(pytest.param(*side, marks=pytest.mark.slow) for side in [("h2o", None), ("freekv", "ram"), ("freekv", "file")]),
]


@pytest.mark.parametrize(("policy", "tier"), SIDES)
def test_a_placed_cache_holds_what_a_prompt_leaves(
    policy: str, tier: str | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue("full_folder" if policy == "full" else f"small_{policy}_folder")
    job = Job(context=100, n_tokens=3, seed=1)
    where = f"file:{tmp_path}" if tier == "file" else tier
    with Engine.load(folder, verify=False, cache_tokens=1000, host_tier=where, host_tokens=1000 if tier else None) as engine:
        read = request_of(engine, job)
        placed = PlacedCaches(engine).decode(job)
        assert engine.runner.pool.n_free == engine.runner.pool.n_pages
    assert len(read.token_ms) == len(placed.token_ms) == 3
    assert placed.first_token_s is None
    assert read.kv_bytes is not None
    assert placed.kv_bytes is not None
    assert placed.kv_bytes == pytest.approx(read.kv_bytes, rel=0.1)


def test_a_policy_whose_budget_follows_from_the_prompt_has_no_placed_cache(small_refreekv_folder: Path) -> None:
    with (
        Engine.load(small_refreekv_folder, verify=False) as engine,
        pytest.raises(Exception, match="follows from a prompt"),
    ):
        PlacedCaches(engine).decode(JOB)


def sample(row: str, context: int, ms: Sequence[float], **changes: Any) -> dict[str, Any]:
    weights = 100 if ROWS[row].weights == "int4" else 400
    values = {
        "synthetic": False,
        "first_token_s": 2.0,
        "token_ms": list(ms),
        "kv_bytes": 10**6,
        "weight_bytes": weights * 10**6,
    }
    values |= {"peak_bytes": 2**30, "cores": 2.0, "joules": 4.0}
    return {"subject": "smollm2", "row": row, "context": context, "round": 0, **values, **changes}


def probe(context: int) -> dict[str, Any]:
    return {"subject": "smollm2", "row": "bandwidth", "context": context, "round": 0, "gb_per_s": 10.0}


FULL, PART, RECALL = "trt-kv full int4", "trt-kv pooledwindow 20 % int4", "trt-kv freekv 2048 int4, file"
SAMPLES = [
    probe(8192),
    sample(FULL, 8192, [9.0, 10.0, 11.0]),
    sample(FULL, 8192, [10.0], round=1),
    sample(PART, 8192, [5.0]),
    sample(RECALL, 8192, [6.0], synthetic=True, first_token_s=None),
    sample("llama.cpp", 8192, [20.0]),
    sample("OpenVINO GenAI", 8192, [12.0], first_token_s=1.0),
    sample("OpenVINO GenAI, its eviction to 20 %", 8192, [1.0]),
    {"subject": "smollm2", "row": "onnxruntime-genai int4", "context": 8192, "round": 0, "why": "no wheel"},
]


def test_a_line_has_medians_and_its_roofline() -> None:
    lines = {line["row"]: line for line in lines_of(SAMPLES, "smollm2")}
    full = lines[FULL]
    assert (full["ms_per_token"], full["prompt_tokens_per_s"], full["peak_mib"]) == (10.0, 4096.0, 1024)
    assert (full["roofline_ms"], full["of_roofline"]) == (10.1, 0.9901)
    assert full["joules_per_token"] == pytest.approx(2.667, abs=0.001)
    assert lines[RECALL]["note"] == "synthetic cache"
    assert (lines["onnxruntime-genai int4"]["ms_per_token"], lines["onnxruntime-genai int4"]["note"]) == (None, "no wheel")
    assert len({tuple(line) for line in lines.values()}) == 1


def test_aims_compare_with_the_best_peer_that_keeps_the_whole_cache() -> None:
    found = {target.what: target for target in targets_of("M", lines_of(SAMPLES, "smollm2"), with_memory=False)}
    decoding = next(target for what, target in found.items() if "whole cache" in what)
    assert "OpenVINO GenAI 12" in decoding.what
    assert decoding.measured == pytest.approx(10 / 12, abs=0.001)
    assert decoding.is_met
    reading = next(target for what, target in found.items() if "time to read" in what)
    assert (reading.measured, reading.is_met) == (2.0, False)
    part = next(target for what, target in found.items() if "pooledwindow" in what and "times faster" in what)
    assert part.measured == pytest.approx(5 / 12, abs=0.001)
    assert (part.limit, part.is_met) == (0.5, True)


def test_where_no_peer_was_measured_its_least_time_stands_in() -> None:
    samples = [
        *SAMPLES,
        sample("llama.cpp", 2048, [9.0], kv_bytes=250_000),
        probe(131072),
        sample(RECALL, 131072, [11.0], synthetic=True, first_token_s=None),
    ]
    targets = targets_of("M", lines_of(samples, "smollm2"), with_memory=False)
    bound = next(target for target in targets if "none was measured" in target.what)
    # llama.cpp reads 400 MB and 122 bytes per token: 416 MB at 10 GB/s.
    assert bound.measured == pytest.approx(11.0 / 41.6, rel=0.02)
    assert not bound.is_met


def test_memory_is_judged_by_what_a_step_reads_and_by_two_gib() -> None:
    samples = [
        sample(PART, 32768, [5.0], peak_bytes=112 * 10**6),
        sample("trt-kv freekv 2048 int4, RAM", 32768, [5.0]),
        sample(RECALL, 131072, [6.0], peak_bytes=3 * 2**30),
    ]
    lines = lines_of(samples, "smollm2")
    found = {target.what: target for target in targets_of("M", lines, with_memory=True) if target.what.startswith("3.")}
    of_budget, of_limit = found.values()
    assert "32768" in of_budget.what
    assert of_budget.measured == pytest.approx(1.11, abs=0.01)
    assert RECALL in of_limit.what
    assert of_limit.measured == 3072.0
    assert not of_budget.is_met
    assert not of_limit.is_met
    assert not [t for t in targets_of("M", lines, with_memory=False) if t.what.startswith("3.")]


def test_results_become_a_page_and_a_picture(tmp_path: Path) -> None:
    document = {"samples": SAMPLES, "machine": {"cores": 2, "cpu": "C"}, "date": "2026-01-02T", "elapsed_s": 60.0}
    document["settings"] = {"threads": 2, "rounds": 2, "n_tokens": 3}
    made = with_tables(document)
    text = section(made)
    assert "| trt-kv full int4 | 10 (" in text
    assert "* onnxruntime-genai int4, 8192 tokens: no wheel" in text
    assert "**missed**: 1. SmolLM2-135M-Instruct, 8192 tokens, time to read them" in text
    draw(made, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000


def plan(**changes: Any) -> Plan:
    values: dict[str, Any] = {"subjects": ("tiny",), "rows": (FULL, PART), "contexts": (512,), "rounds": 2, "n_tokens": 4}
    return Plan(**{**values, "threads": 1, "minutes": 1.0, "job_s": 5.0, **changes})


contexts: list[tuple[int, bool]] = []
"""Context and kind of cache of each job that workers of ``without_models`` were asked for."""


@pytest.fixture
def without_models(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, int]]:
    """Rows whose workers answer at once; the list of (model, seed) that were asked."""
    asked: list[tuple[str, int]] = []
    contexts.clear()
    subject = subjects.Subject(
        name="tiny",
        title="tiny",
        checkpoint=tmp_path,
        gguf=tmp_path,
        folder=tmp_path,
        n_layers=1,
        n_kv_heads=1,
        head_size=8,
        hidden_size=8,
        vocab_size=1000,
        max_positions=2048,
        longest_prompt=512,
    )

    class FakeWorker:
        is_alive = True

        def __init__(self, *_: object, **__: object) -> None:
            self.model = ""

        def __enter__(self) -> "FakeWorker":
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def set_up(self, setup: Setup, *, within_s: float) -> tuple[dict[str, object], float]:
            self.model = Path(setup.model).name
            return {"version": "1"}, within_s

        def run(self, job: Job, *, within_s: float) -> Measured[Answer]:
            if job.seed >= 0:
                asked.append((self.model, job.seed))
                contexts.append((job.context, job.synthetic))
            answer = Answer(first_token_s=within_s, token_ms=[1.0] * job.n_tokens)
            return Measured(answer=answer, peak_bytes=1, cpu_s=1.0, wall_s=1.0)

    class FakeProbe:
        def __init__(self, n_threads: int) -> None:
            assert n_threads == 1

        def gb_per_s(self) -> float:
            return 10.0

    def prepare(row: Any, _: object) -> Prepared | str:
        if row.name == RECALL:
            return "it is not made yet"
        return Prepared(python=tmp_path, module="m", model=tmp_path / row.name, options={}, weight_bytes=1, places_caches=True)

    monkeypatch.setattr(measure, "Worker", FakeWorker)
    monkeypatch.setattr(measure, "Probe", FakeProbe)
    monkeypatch.setattr(measure, "prepared", prepare)
    monkeypatch.setitem(subjects.SUBJECTS, "tiny", lambda: subject)
    return asked


def run(of: Plan, samples: list[dict[str, Any]]) -> None:
    Run(of, samples, save=lambda: None, say=lambda _: None).measure()


def test_rows_take_turns_and_a_finished_run_measures_nothing_more(without_models: list[tuple[str, int]]) -> None:
    samples: list[dict[str, Any]] = []
    run(plan(), samples)
    assert without_models == [(FULL, 0), (PART, 0), (PART, 1), (FULL, 1)]
    run(plan(), samples)
    assert len(without_models) == 4


def test_beyond_a_models_positions_and_long_prompts_caches_are_synthetic(without_models: list[tuple[str, int]]) -> None:
    run(plan(rows=(FULL,), contexts=(4096, 512, 2048), rounds=1), [])
    assert len(without_models) == 3
    # Prompt, answer and room fit the 2,048 positions.
    assert contexts == [(512, False), (1952, True), (4096, True)]


def test_how_long_a_prompt_takes_follows_from_the_two_longest_ones() -> None:
    def read(context: int, seconds: float) -> dict[str, Any]:
        return sample(FULL, context, [1.0], first_token_s=seconds)

    history = History([read(512, 9.0), read(1024, 1.0), read(2048, 3.0)])
    assert history.expected_s("smollm2", FULL, 4096) == pytest.approx(9.0)
    assert History([read(1024, 1.0)]).expected_s("smollm2", FULL, 4096) == pytest.approx(4.0)
    assert History([]).expected_s("smollm2", FULL, 4096) == 0.0


def test_our_runner_does_not_hold_what_an_engine_does_not_need() -> None:
    code = "import sys, benchmarks.peers.runners.ours; print({'torch', 'onnx'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_what_a_run_had_no_time_for_is_said_and_made_up_for(without_models: list[tuple[str, int]]) -> None:
    samples: list[dict[str, Any]] = []
    run(plan(minutes=-1.0), samples)
    assert [s["why"] for s in samples if "why" in s] == [OUT_OF_TIME] * 2
    assert without_models == []
    run(plan(), samples)
    assert len(without_models) == 4
    assert not [s for s in samples if "why" in s]


def test_a_row_that_cannot_be_prepared_says_why(without_models: list[tuple[str, int]]) -> None:
    samples: list[dict[str, Any]] = []
    run(plan(rows=(FULL, RECALL), rounds=1), samples)
    assert [(s["row"], s["why"]) for s in samples if "why" in s] == [(RECALL, "it is not made yet")]
    assert without_models == [(FULL, 0)]


def test_the_command_writes_results_that_it_can_read(without_models: list[tuple[str, int]], tmp_path: Path) -> None:
    words = ["--model", "tiny", "--row", FULL, "--contexts", "512", "--rounds", "1", "--threads", "1", "--out", str(tmp_path)]
    outcome = click.testing.CliRunner().invoke(command.main, words, catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    document = json.loads((tmp_path / "peers.json").read_text())
    assert document["tables"]["a tiny shape, random weights"][0]["row"] == FULL
    again = click.testing.CliRunner().invoke(command.main, ["--from-results", "--out", str(tmp_path)], catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "peers.json").read_text()) == document
    assert without_models == [(FULL, 0)]
