"""What the benchmarks promise: nothing is reported unchecked, sides are treated alike, and what they say about memory holds."""

import json
import math
from pathlib import Path
from typing import Any

import click.testing
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from benchmarks import memory
from benchmarks.__main__ import MODULES, RESULTS, main
from benchmarks.harness import BenchmarkError, Check, Report, Target, Timings, check_close, measured, save, show, take_turns
from benchmarks.memory import peak_growth_bytes
from benchmarks.models import MASS, PAGE_SIZE, Shape, model_runner
from benchmarks.speed.recall_cache import CALM, Drift, PoolTier, SharedTier
from benchmarks.speed.recall_timeline import hidden_work
from trt_kv.hf_config import model_config_from_hf
from trt_kv.plugins.paging import Floats
from trt_kv.plugins.recall_attention.choice import drifted_heads
from trt_kv.runtime.backends.base import Attend
from trt_kv.runtime.backends.host.recall.store import RamTier
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.backends.step import Ints

MIB = 2**20
CHECK = Check(what="one is one", error=0.0, allowed=0.0)
REPORT = Report(
    title="a benchmark",
    settings={"rounds": 1},
    checks=[CHECK],
    tables={"a table": [{"side": "ours", "median_ms": 1.5, "share": None}]},
    targets=[Target(what="fast enough", measured=1.05, limit=1.1), Target(what="small enough", measured=3.0, limit=2.0)],
)

needs_high_water_mark = pytest.mark.skipif(not memory.CLEAR_REFS.exists(), reason="needs Linux's high-water mark")


class RandomLayers:
    """A dense executor without a model: random q, k and v for one layer."""

    description = "random numbers"

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def run(self, input_ids: Ints, positions: Ints, logit_rows: Ints, attend: Attend) -> Floats:
        rng = np.random.default_rng(int(positions[0]))
        heads = (self._shape.n_heads, self._shape.n_kv_heads, self._shape.n_kv_heads)
        q, k, v = (rng.standard_normal((len(input_ids), n, self._shape.head_dim), np.float32) for n in heads)
        attend(0, q, k, v)
        return np.zeros((len(logit_rows), self._shape.vocab_size), np.float32)


@needs_high_water_mark
def test_prefill_with_scores_never_holds_an_attention_matrix() -> None:
    shape = Shape(n_layers=1, hidden_size=1, n_heads=8, n_kv_heads=2, head_dim=32, intermediate_size=1)
    n_tokens = 4096
    config = model_config_from_hf({**shape.hf_config, "hidden_size": 256}, source="test")
    runner = model_runner(RandomLayers(shape), config, policy=MASS, cache_tokens=n_tokens, chunk=256)
    runner.importance([1] * 300)
    growth = peak_growth_bytes(lambda: runner.importance([1] * n_tokens))
    one_matrix = 4 * n_tokens**2
    assert growth < one_matrix < shape.n_heads * one_matrix


@needs_high_water_mark
def test_peak_growth_counts_what_is_allocated_and_freed_again() -> None:
    assert 180 * MIB < peak_growth_bytes(lambda: np.ones(200 * MIB, np.uint8).sum()) < 260 * MIB


def test_no_report_without_a_check() -> None:
    with pytest.raises(BenchmarkError, match="checked nothing"):
        Report(title="unchecked", settings={}, checks=[], tables={})


@pytest.mark.parametrize("wrong", [1.2, math.nan])
def test_sides_that_disagree_stop_the_benchmark(wrong: float) -> None:
    with pytest.raises(BenchmarkError, match="the sides disagree: logits"):
        check_close("logits", np.array([1.0, wrong]), np.array([1.0, 1.0]), within=0.1)


def test_a_check_records_how_close_the_sides_are() -> None:
    check = check_close("logits", np.array([1.0, 1.05]), np.array([1.0, 1.0]), within=0.1)
    assert (round(check.error, 6), check.allowed) == (0.05, 0.1)


@given(n_sides=st.integers(1, 5), rounds=st.integers(1, 12), warmup=st.integers(0, 3))
def test_sides_take_turns(n_sides: int, rounds: int, warmup: int) -> None:
    """Each side runs once per round, and leads as many rounds as any other, give or take one."""
    calls: list[int] = []
    sides = {str(side): lambda side=side: calls.append(side) for side in range(n_sides)}
    timings = take_turns(sides, rounds=rounds, warmup=warmup)
    in_rounds = [calls[i : i + n_sides] for i in range(0, len(calls), n_sides)]
    assert len(in_rounds) == rounds + warmup
    assert all(sorted(called) == list(range(n_sides)) for called in in_rounds)
    leads = np.bincount([called[0] for called in in_rounds[warmup:]], minlength=n_sides)
    assert leads.max() - leads.min() <= 1
    assert all(len(samples) == rounds and (samples >= 0).all() for samples in timings.samples_ms.values())


@given(st.lists(st.tuples(st.floats(1, 9), st.floats(1, 9)), min_size=1, max_size=30))
def test_the_ratio_lies_in_its_interval(rounds: list[tuple[float, float]]) -> None:
    ours, base = np.array(rounds).T
    timings = Timings(samples_ms={"ours": ours, "base": base})
    low, high = (float(end) for end in timings.interval("ours", "base").split(" .. "))
    assert low - 0.01 <= timings.ratio("ours", "base") <= high + 0.01
    assert timings.rows("base")[1]["ratio"] == 1.0


def test_a_document_says_where_and_with_what_it_was_measured(tmp_path: Path) -> None:
    document = measured(lambda: REPORT)
    save(document, tmp_path / "new" / "one.json")
    read = json.loads((tmp_path / "new" / "one.json").read_text())
    assert read["machine"]["cores"] >= 1
    assert {"torch", "onnxruntime", "numba"} <= set(read["packages"])
    assert [target["is_met"] for target in read["targets"]] == [True, False]
    assert read["tables"] == {"a table": [{"side": "ours", "median_ms": 1.5, "share": None}]}


def test_tables_and_verdicts_are_printed() -> None:
    console = Console(record=True, width=100)
    show(measured(lambda: REPORT), console)
    text = console.export_text()
    assert "median_ms" in text
    assert "met: fast enough: 1.05 (at most 1.1)" in text
    assert "missed: small enough" in text


def test_results_of_every_benchmark_are_committed() -> None:
    for name in MODULES:
        document = json.loads((RESULTS / f"{name}.json").read_text())
        assert document["checks"], name
        assert all(check["error"] <= check["allowed"] for check in document["checks"]), name
        assert all(len({tuple(row) for row in rows}) == 1 for rows in document["tables"].values()), name


def test_a_quick_run_leaves_the_results_alone() -> None:
    before = {path: path.stat().st_mtime_ns for path in RESULTS.glob("*.json")}
    outcome = click.testing.CliRunner().invoke(main, ["attention_kernels", "--quick"], catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert {path: path.stat().st_mtime_ns for path in RESULTS.glob("*.json")} == before


def test_saved_results_are_printed_without_measuring(tmp_path: Path) -> None:
    save(measured(lambda: REPORT), tmp_path / "prefill_memory.json")
    options = ["prefill_memory", "--saved", "--out", str(tmp_path)]
    outcome = click.testing.CliRunner().invoke(main, options, catch_exceptions=False)
    assert "a benchmark" in outcome.output
    assert "1.5" in outcome.output


def test_an_unknown_benchmark_is_named() -> None:
    outcome = click.testing.CliRunner().invoke(main, ["attention"])
    assert outcome.exit_code == 2
    assert "split_vs_monolithic" in outcome.output


@pytest.mark.parametrize("drift", [CALM, Drift(name="some", events=0.5, heads=0.4)])
def test_queries_drift_as_often_as_they_are_told(drift: Drift) -> None:
    """In share events * heads of all cases, judged as the op judges; the others keep their cosine."""
    config = model_config_from_hf(
        Shape(n_layers=3, hidden_size=64, n_heads=12, n_kv_heads=6, head_dim=64, intermediate_size=1).hf_config, source="test"
    )
    queries = drift.queries(config, 101)
    drifted = [
        drifted_heads(now, before, config.n_kv_heads, 0.8)
        for step in range(100)
        for before, now in zip(queries[step], queries[step + 1], strict=True)
    ]
    assert np.mean(drifted) == pytest.approx(drift.events * drift.heads, abs=0.05)
    assert np.abs(queries).max() < 8


def test_sides_share_pages_that_none_of_them_can_change() -> None:
    sizes: dict[str, Any] = {"page_size": PAGE_SIZE, "n_kv_heads": 3, "head_size": 5}
    pool = HostKvPool(n_pages=4, **sizes)
    pool.kv[:] = np.arange(pool.kv.size).reshape(pool.kv.shape)
    tier = SharedTier(PoolTier(pool), RamTier(n_pages=2, **sizes), n_shared=3)
    own = -pool.kv[0]
    tier.write(3, own)
    np.testing.assert_array_equal(tier.read_pages([1, 2, 3]), np.stack([pool.kv[1], pool.kv[2], own]))
    part = np.empty((2, PAGE_SIZE, 5), np.float32)
    tier.read_head(2, 1, part)
    np.testing.assert_array_equal(part, pool.kv[2, :, 1])
    assert (pool.kv >= 0).all()
    with pytest.raises(AssertionError, match="never written"):
        tier.write(2, own)


def test_work_is_hidden_while_the_model_works() -> None:
    """A job of 10 us works for 6: 2 before the step ends, 1 of them while the step waits for copies."""
    spans = [("decode step", 1, 0, 20), ("join", 1, 19, 1), ("recalling pages", 2, 14, 10), ("waiting for attention", 2, 14, 4)]
    events = [{"name": name, "tid": tid, "ts": float(ts), "dur": float(dur)} for name, tid, ts, dur in spans]
    assert hidden_work(events) == (6.0, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n_exact"), [("recall_speed", 2), ("recall_timeline", 2), ("recall_steps", 1)])
def test_recall_benchmarks_run_small(name: str, n_exact: int, tmp_path: Path) -> None:
    """They check that all sides say the same, bit for bit, before they measure."""
    click.testing.CliRunner().invoke(main, [name, "--quick", "--out", str(tmp_path)], catch_exceptions=False)
    document = json.loads((tmp_path / f"{name}.json").read_text())
    assert sum(check["error"] == check["allowed"] == 0.0 for check in document["checks"]) >= n_exact


@pytest.mark.slow
def test_the_serving_benchmark_runs_small(tmp_path: Path) -> None:
    """It checks that the core and static groups generate the same tokens before it measures."""
    click.testing.CliRunner().invoke(main, ["serving_core", "--quick", "--out", str(tmp_path)], catch_exceptions=False)
    document = json.loads((tmp_path / "serving_core.json").read_text())
    assert sum(check["error"] == check["allowed"] == 0.0 for check in document["checks"]) == 2
    assert len(document["tables"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_runs(name: str, tmp_path: Path) -> None:
    click.testing.CliRunner().invoke(main, [name, "--quick", "--out", str(tmp_path)], catch_exceptions=False)
    assert json.loads((tmp_path / f"{name}.json").read_text())["tables"]
