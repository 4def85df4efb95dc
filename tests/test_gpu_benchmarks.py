"""``python -m benchmarks.gpu``: all of it works without a GPU, in tiny sizes; a section that fails is not reported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click.testing
import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.gpu import kernel_timeline
from benchmarks.harness import BenchmarkError, Check, Report, measured, save
from tests.triton_kernels import ROOT


@pytest.mark.timeout(900)
@pytest.mark.parametrize("on", [pytest.param("gpu", marks=pytest.mark.gpu), pytest.param("cpu", marks=pytest.mark.slow)])
def test_every_section_runs_small(on: str, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in command.RESULTS.iterdir()}
    environment = os.environ if on == "gpu" else {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    arguments = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--out", str(tmp_path)]
    outcome = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    for name in command.SECTIONS:
        document = json.loads((tmp_path / f"gpu_{name}.json").read_text())
        assert document["quick"], name
        assert (document["gpu"]["name"] is None) == (on == "cpu")
        assert document["checks"], name
        assert all(check["error"] <= check["allowed"] for check in document["checks"]), name
        assert all(len({tuple(row) for row in rows}) == 1 for rows in document["tables"].values()), name
        assert document["targets"] == [], "tiny sizes say nothing about a promise"
    assert {path: path.stat().st_mtime_ns for path in command.RESULTS.iterdir()} == before


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_has_gpu", lambda: False)
    outcome = click.testing.CliRunner().invoke(command.main, [])
    assert outcome.exit_code == 1
    assert "--quick" in outcome.output


def test_a_section_that_fails_writes_nothing_and_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(title="fine", settings={}, checks=[Check(what="it", error=0.0, allowed=0.0)], tables={})

    def run(arguments: list[str], **_options: Any) -> "subprocess.CompletedProcess[str]":
        name, file = arguments[3:5]
        if name == "prefill_scores":
            raise subprocess.TimeoutExpired(arguments, 1)
        if name != "recall_copies":
            save({**measured(lambda: report), "gpu": {"name": "a GPU"}}, Path(file))
        return subprocess.CompletedProcess(arguments, returncode=int(name == "recall_copies"))

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(command, "_has_gpu", lambda: True)
    outcome = click.testing.CliRunner().invoke(command.main, ["--out", str(tmp_path)])
    assert outcome.exit_code == 1
    assert "failed: prefill_scores, recall_copies" in outcome.output
    fine = set(command.SECTIONS) - {"prefill_scores", "recall_copies"}
    assert {path.stem for path in tmp_path.iterdir()} == {f"gpu_{name}" for name in fine}


def test_a_kernel_that_is_wrong_stops_its_section(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from benchmarks.gpu import device
    from trt_kv.plugins.registry import kernel, op_specs

    def wrong(**tensors: Any) -> tuple[torch.Tensor, ...]:
        arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in tensors.items()}
        out, lse = kernel("CachedAttention", "reference")(**arrays)
        return torch.from_numpy(out) * 1.1, torch.from_numpy(lse)

    monkeypatch.setattr(device, "device_kernel", lambda _op: wrong)
    monkeypatch.setattr(device, "device", lambda: torch.device("cpu"))
    case = op_specs()["CachedAttention"].cases[0]
    with pytest.raises(BenchmarkError, match="CachedAttention and its reference"):
        device.check_kernel("CachedAttention", case, torch.float32, within=1e-2)


def test_queries_drift_as_often_as_is_asked_for() -> None:
    import torch

    from benchmarks.gpu.freekv_model import Corrections, Shape, drifting_queries

    shape, n_steps, batch = Shape(n_layers=5, n_heads=12, n_kv_heads=4, head_size=14), 7, 3
    q, corrected = drifting_queries(shape, batch, n_steps, Corrections(layer_steps=0.6, heads=0.5))
    assert q.shape == (n_steps, 5, batch, 12, 14)
    assert corrected[0].all()
    of_step = corrected[1:]
    assert of_step.any(3).sum((1, 2)).tolist() == [9] * 6, "60 % of 5 layers of 3 sequences, in every step"
    assert set(of_step.sum(3).unique().tolist()) == {0, 2}, "half of 4 KV heads, or none"
    cosines = torch.nn.functional.cosine_similarity(q[1:], q[:-1], dim=-1).unflatten(-1, (4, 3)).mean(-1)
    assert torch.equal(cosines < shape.policy.tau, of_step)
    assert not drifting_queries(shape, batch, n_steps, Corrections(layer_steps=0.0, heads=0.5))[1][1:].any()


def test_what_goes_wrong_in_one_combination_or_comes_too_late_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import freekv

    tiers = SimpleNamespace(recall=SimpleNamespace(release=list, sets=SimpleNamespace(rows=[])))
    monkeypatch.setattr(freekv, "Tiers", lambda _shape: tiers)
    bench = freekv.Bench(freekv.SMALL, limit_s=1000.0)

    def fails() -> None:
        raise RuntimeError("no memory")

    bench.attempt("large", fails)
    bench.attempt("small", lambda: bench.rows.append({"side": "small"}))
    late = freekv.Bench(freekv.SMALL, limit_s=-1.0)
    late.attempt("large", fails)
    late.attempt("timeline", lambda: late.rows.append({"side": "timeline"}), always=True)
    assert bench.notes == ["large: RuntimeError: no memory"]
    assert bench.rows == [{"side": "small"}]
    assert (late.left_out, late.notes, late.rows) == (["large"], [], [{"side": "timeline"}])


def test_ours_is_compared_with_itself_where_both_rates_were_measured() -> None:
    from benchmarks.gpu.freekv_tables import CALM, OFTEN, overview, targets_of

    def row(batch: int, side: str, rate: Any, median_ms: float) -> dict[str, Any]:
        names = {"tokens": 32768, "batch": batch, "side": side, "median_ms": median_ms}
        return {**names, "rate": rate and rate.layer_steps, "rate_of_heads": rate and rate.heads}

    rows = [row(1, "ours", CALM, 10.0), row(1, "ours", OFTEN, 14.0), row(4, "ours", CALM, 20.0), row(1, "whole", None, 5.0)]
    (target,) = targets_of(rows, "ours")
    assert (target.measured, target.is_met) == (1.4, False)
    assert "batch 1" in target.what
    lines = overview(rows)
    assert [line["90% / 0%"] for line in lines] == [1.4, None, None]
    assert lines[2]["any rate"] == 5.0


def traced(layers: int, *, side: int, begin_us: float = 0.0) -> list[dict[str, Any]]:
    """A step as a profiler tells it: in each layer 100 us of products, 20 us of attention; 50 us of recall from 10 us on."""
    kernels = []
    for layer in range(layers):
        at = begin_us + 120.0 * layer
        of_layer = (("nvjet_tst_64x8", 7, 0, 100), ("recall_kernel", side, 10, 50), ("decode_kernel", 7, 100, 20))
        kernels += [(name, stream, at + start, duration) for name, stream, start, duration in of_layer]
    kernels.append(("recall_kernel", side, begin_us + 120.0 * layers - 10, 40))
    return [
        {"cat": "kernel", "name": name, "ts": start, "dur": duration, "args": {"stream": stream}}
        for name, stream, start, duration in kernels
    ]


def test_a_timeline_tells_which_recall_is_hidden_and_can_be_drawn_again(tmp_path: Path) -> None:
    others: list[dict[str, Any]] = [
        {"cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 0, "dur": 5},
        {"ph": "M", "name": "process_name"},
    ]
    sleep = {"cat": "kernel", "name": "spin_kernel(long)", "ts": 2e4, "dur": 1e4, "args": {"stream": 7}}
    first, second = kernel_timeline.steps_of([*others, *traced(6, side=8), sleep, *traced(6, side=8, begin_us=4e4)])
    assert len(first) == len(second) == 19
    assert [event.kind for event in second[:3]] == ["dense", "recall", "attention"]
    assert kernel_timeline.Event(name="plan_kernel", stream=8, start_us=0.0, duration_us=1.0).kind == "choose"
    assert kernel_timeline.tells_streams_apart(first)
    assert not kernel_timeline.tells_streams_apart(kernel_timeline.steps_of(traced(6, side=7))[0])
    found = kernel_timeline.hidden_work(second)
    assert (found["step_us"], found["main_busy_us"]) == (750.0, 720.0)
    assert (found["recall_ahead_us"], found["recall_hidden_percent"]) == (340.0, 91.2)
    assert (found["recall_main_us"], found["choose_ahead_us"], found["choose_hidden_percent"]) == (0, 0, None)

    lines = kernel_timeline.to_json(second)
    assert kernel_timeline.hidden_work(kernel_timeline.from_json(lines)) == found
    results, picture = tmp_path / "results.json", tmp_path / "images" / "picture.png"
    results.write_text(json.dumps({"settings": {"timeline": {"title": "a step", "events": lines}}}))
    kernel_timeline.draw_results(results, picture)
    assert picture.read_bytes().startswith(b"\x89PNG")
    results.write_text(json.dumps({"settings": {"timeline": None}}))
    with pytest.raises(BenchmarkError, match="no timeline"):
        kernel_timeline.draw_results(results, picture)
