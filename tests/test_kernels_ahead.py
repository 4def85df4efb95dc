"""Kernels are compiled beside a build, so that a new engine answers at once."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trt_kv.pipeline import BuildRequest, ModelSource, TargetPlan, kernels_beside
from trt_kv.pipeline.callbacks import ignore
from trt_kv.policies import policy_from_name
from trt_kv.runtime.backends.host import kernels_ahead


def _request(**target: Any) -> BuildRequest:
    return BuildRequest(
        source=ModelSource(model="llama3"), policy=policy_from_name("h2o"), out=Path("unused"), target=TargetPlan(**target)
    )


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that are started, in place of which a process sleeps; no kernel is in the cache."""
    commands: list[list[str]] = []
    popen = subprocess.Popen

    def sleeps(command: list[str], **options: Any) -> Any:
        commands.append(command)
        return popen([sys.executable, "-c", "import time; time.sleep(60)"], **options)

    monkeypatch.setattr(subprocess, "Popen", sleeps)
    monkeypatch.setattr(kernels_ahead, "cache_folder", lambda: str(tmp_path))
    return commands


def test_what_is_compiled_are_the_ops_of_the_policy_in_the_type_of_the_cache(started: list[list[str]]) -> None:
    with pytest.raises(KeyboardInterrupt), kernels_beside.kernels_beside(_request(kv_dtype="int8"), ignore):
        raise KeyboardInterrupt
    assert [command[2:] for command in started] == [
        ["trt_kv.runtime.backends.host.kernels_ahead", "int8", "CachedAttention", "EvictTokens", "TokenScores"]
    ]


def test_kernels_in_the_cache_are_not_compiled_again(started: list[list[str]]) -> None:
    marker = kernels_ahead.marker_of("float32", ["CachedAttention", "EvictTokens", "TokenScores"])
    assert marker is not None
    marker.touch()
    with kernels_beside.kernels_beside(_request(), ignore):
        pass
    assert not started


@pytest.mark.parametrize("target", [{"dtype": "float16"}, {"target": "tensorrt"}])
def test_engines_for_gpus_need_none(started: list[list[str]], target: dict[str, str]) -> None:
    with kernels_beside.kernels_beside(_request(**target), ignore):
        pass
    assert not started


def test_a_cache_that_cannot_be_written_is_left_alone(started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels_ahead, "cache_folder", lambda: None)
    with kernels_beside.kernels_beside(_request(), ignore):
        pass
    assert not started


_COUNT = """
import sys
from numba.core import event
from trt_kv import Engine
with event.install_recorder("numba:compile") as recorder:
    engine = Engine.load(sys.argv[1], cache_tokens=2000)
    engine.generate([token % 30 + 1 for token in range(60)], max_new_tokens=2, temperature=0.5)
print(sum(part.is_start for _, part in recorder.buffer))
"""


@pytest.mark.slow
def test_an_engine_compiles_nothing_afterwards(tmp_path: Path, small_h2o_folder: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", kernels_ahead.__name__, "float32", "CachedAttention", "EvictTokens", "TokenScores"]
    subprocess.run(command, env=environment, check=True, timeout=280)
    counted = subprocess.run(
        [sys.executable, "-c", _COUNT, str(small_h2o_folder)], env=environment, check=True, capture_output=True, text=True
    )
    assert int(counted.stdout) == 0
