"""``python -m benchmarks.gpu``: all of it works without a GPU, in tiny sizes; a section that fails is not reported."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click.testing
import pytest

from benchmarks.gpu import __main__ as command
from benchmarks.harness import BenchmarkError, Check, Report, measured, save
from tests.triton_kernels import ROOT


@pytest.mark.parametrize("on", [pytest.param("gpu", marks=pytest.mark.gpu), "cpu"])
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
