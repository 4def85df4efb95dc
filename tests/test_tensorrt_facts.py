"""``python -m benchmarks.gpu.tensorrt_facts``: no fact is lost to another one's crash, and none is claimed without a GPU."""

import contextlib
import json
import os
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from benchmarks.gpu import tensorrt_fact, tensorrt_facts
from benchmarks.gpu.tensorrt_examples import Attention, Plain, RefusedError, plan_of
from tests.tensorrt_plugins import HostMemory, deregister_plugins

ANSWER = 'import pathlib, sys; pathlib.Path(sys.argv[1]).write_text(\'{"outcome": "yes", "detail": "fine"}\');'
CRASH = "import os, signal; print('last words', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"


def answer_of(code: str, folder: Path, *, limit_s: float = 30.0) -> dict[str, Any]:
    file = folder / "answer.json"
    command = [sys.executable, "-c", code, str(file)]
    return tensorrt_facts.answer_of(command, file, limit_s=limit_s, environment={})


def test_an_answer_is_what_the_process_wrote(tmp_path: Path) -> None:
    answer = answer_of(ANSWER, tmp_path)
    assert (answer["outcome"], answer["detail"]) == ("yes", "fine")
    assert "log" not in answer


def test_a_crash_is_an_answer_with_the_last_words(tmp_path: Path) -> None:
    answer = answer_of(CRASH, tmp_path)
    assert answer["outcome"] == "crash: signal 11 (SIGSEGV)"
    assert "last words" in answer["log"]


def test_a_crash_after_the_answer_does_not_change_it(tmp_path: Path) -> None:
    answer = answer_of(ANSWER + CRASH, tmp_path)
    assert answer["outcome"] == "yes"
    assert "SIGSEGV" in answer["detail"]


def test_an_error_that_is_no_answer_is_told_as_such(tmp_path: Path) -> None:
    answer = answer_of("raise ImportError('no such library')", tmp_path)
    assert answer["outcome"] == "error: exit status 1"
    assert answer["detail"] == "ImportError: no such library"


def test_a_process_that_hangs_is_stopped_with_all_it_started(tmp_path: Path) -> None:
    start = time.monotonic()
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    answer = answer_of(child, tmp_path, limit_s=1.0)
    assert answer["outcome"] == "timeout: 1 s"
    assert time.monotonic() - start < 30


def test_without_a_gpu_no_fact_is_found_out(tmp_path: Path) -> None:
    out = tmp_path / "facts.json"
    command = [sys.executable, "-m", "benchmarks.gpu.tensorrt_facts", "--out", str(out)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run(command, check=True, cwd=tensorrt_facts.ROOT, env=environment, capture_output=True)
    document = json.loads(out.read_text())
    assert list(document["facts"]) == list(tensorrt_fact.FACTS)
    assert {fact["outcome"] for fact in document["facts"].values()} == {"not run: no CUDA device"}


def test_plans_are_built_out_of_sight_of_a_gpu_that_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(command: list[str], _file: Path, *, environment: dict[str, str], **_limit: float) -> dict[str, Any]:
        name = command[4]
        if name == "machine":
            return {"outcome": "yes", "detail": '{"gpu": "a GPU"}'}
        refused = name == "build_plain" and not environment
        return {"outcome": "no" if refused else "yes", "detail": name}

    monkeypatch.setattr(tensorrt_facts, "answer_of", answer)
    out = tmp_path / "facts.json"
    tensorrt_facts.main(["pinned_input", "plain_engine", "--out", str(out)])
    document = json.loads(out.read_text())
    assert document["machine"]["detail"]["gpu"] == "a GPU"
    outcomes = {name: answer["outcome"] for name, answer in document["builds"].items()}
    assert outcomes == {"build_plain": "no", "build_plain_without_gpu": "yes", "build_attention": "yes"}
    assert {name: fact["question"] for name, fact in document["facts"].items()} == {
        "pinned_input": tensorrt_fact.PINNED,
        "plain_engine": tensorrt_fact.RUNTIME,
    }


@pytest.fixture
def host_as_gpu(tensorrt: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Host memory in the place of a GPU's: plugins run there, and a recorded graph is what was launched."""
    from trt_kv.plugins import tensorrt_base

    launched: list[Callable[[], None]] = []

    class Graph:
        """Replays what was launched while it was recorded."""

        def replay(self) -> None:
            launched[-1]()

    def enqueue(plugin: Any, *arguments: Any) -> None:
        launched.append(lambda: original(plugin, *arguments))
        original(plugin, *arguments)

    original = tensorrt_base.OpPlugin.enqueue
    monkeypatch.setattr(tensorrt_base.OpPlugin, "enqueue", enqueue)
    monkeypatch.setattr(tensorrt_base, "CudaMemory", HostMemory)
    monkeypatch.setattr(torch.Tensor, "cuda", torch.Tensor.clone)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: types.SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda *_graph, **_options: contextlib.nullcontext())
    yield
    deregister_plugins()


WITHOUT_ENGINE = [name for name in tensorrt_fact.FACTS if "plugin_without_engine" in name]


@pytest.mark.parametrize("name", WITHOUT_ENGINE)
def test_facts_about_the_plugin_alone_hold_on_the_host(host_as_gpu: None, name: str, tmp_path: Path) -> None:
    assert "differ" in tensorrt_fact.FACTS[name][1](tmp_path)


def test_a_graph_that_does_nothing_when_replayed_is_noticed(
    host_as_gpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=lambda: None))
    with pytest.raises(RefusedError, match="'out' is wrong"):
        tensorrt_fact.FACTS["graph_of_plugin_without_engine_relaxed"][1](tmp_path)


def test_a_wrong_result_is_no_yes(host_as_gpu: None) -> None:
    at = tensorrt_fact.bound(Plain())
    inputs = at.example.inputs(3)
    at.fill(inputs)
    with pytest.raises(RefusedError, match="'y' is wrong by nan"):
        at.check(inputs)
    at.tensors["y"].copy_(torch.from_numpy(at.example.expected(inputs)["y"]))
    assert at.check(inputs) == 0.0
    at.tensors["y"][5, 7] += 1
    with pytest.raises(RefusedError, match="'y' is wrong by 1"):
        at.check(inputs)


@pytest.mark.parametrize("example", [Plain, Attention])
def test_the_engines_build(host_as_gpu: None, example: type[Plain] | type[Attention]) -> None:
    assert len(plan_of(example())) > 1000
