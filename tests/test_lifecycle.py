"""Engines at the edges of a process: forks, closing, threads, too little memory. Each is refused by name, and nothing hangs."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.serving import assert_idle, engine_under, prompts_of, small_policy
from trt_kv.errors import CapacityError, EngineError, RecallError, UsageError
from trt_kv.runtime import memory
from trt_kv.runtime.engine import Engine

ROOT = Path(__file__).parent.parent
IN_A_CHILD = """
import os, sys
from trt_kv.errors import TrtKvError
from trt_kv.runtime.engine import Engine

def in_a_child(work):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            print(work())
        except TrtKvError as error:
            print(type(error).__name__, error.what)
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0

def ask(engine):
    return engine.generate("the old storm", max_new_tokens=3).text
"""


def lines_of(program: str, *arguments: str | Path) -> list[str]:
    """What a program says that forks; it must end by itself, and well."""
    command = [sys.executable, "-c", IN_A_CHILD + program, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["small_folder", "small_freekv_folder"])
def test_a_fork_is_told_at_once_and_the_parent_goes_on(kind: str, request: pytest.FixtureRequest) -> None:
    program = """
engine = Engine.load(sys.argv[1], cache_tokens=1000)
expected = ask(engine)
stream = engine.stream("the old storm", max_new_tokens=3)
said = next(stream)
in_a_child(lambda: ask(engine))
in_a_child(lambda: next(stream))
in_a_child(lambda: engine.stream("the old storm"))
in_a_child(lambda: (stream.close(), engine.close(), "closed nothing")[-1])
in_a_child(lambda: Engine.load(sys.argv[1]))
child = os.fork()
if child == 0:
    ask(engine)  # ends the child with a traceback, and not with a wait for threads
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(ask(engine) == expected == said + "".join(stream))
"""
    used = "UsageError an engine cannot be used in a fork of the process that loaded it"
    loaded = "UsageError an engine cannot be loaded in a fork of a process that has loaded or built one"
    assert lines_of(program, request.getfixturevalue(kind)) == [used, used, used, "closed nothing", loaded, "1", "True"]


def test_a_fork_of_a_process_without_engines_loads_its_own(small_folder: Path) -> None:
    program = """
in_a_child(lambda: ask(Engine.load(sys.argv[1])))
in_a_child(lambda: ask(Engine.load(sys.argv[1])))
print(ask(Engine.load(sys.argv[1])))
"""
    first, second, third = lines_of(program, small_folder)
    assert first == second == third != ""


def test_a_fork_of_a_process_that_built_an_engine_is_told_too(
    small_folder: Path, small_checkpoint_folder: Path, tmp_path: Path
) -> None:
    """torch's threads do not survive a fork either."""
    program = """
from pathlib import Path
from trt_kv.pipeline import BuildRequest, ModelSource, build_engine
from trt_kv.policies import policy_from_name

source, policy = ModelSource(model="llama3", checkpoint=sys.argv[2]), policy_from_name("full")
build_engine(BuildRequest(source=source, policy=policy, out=Path(sys.argv[3])))
in_a_child(lambda: Engine.load(sys.argv[1]))
"""
    said = lines_of(program, small_folder, small_checkpoint_folder, tmp_path / "engine")
    assert said == ["UsageError an engine cannot be loaded in a fork of a process that has loaded or built one"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of address space are Linux'")
@pytest.mark.parametrize("more_mb", [2, 20])
def test_too_little_memory_is_refused_with_what_to_change(small_folder: Path, more_mb: int) -> None:
    program = """
import resource
import trt_kv.runtime.backends.host.load

def under_a_limit():
    (size,) = [line for line in open("/proc/self/status") if line.startswith("VmSize")]
    limit = int(size.split()[1]) * 2**10 + int(sys.argv[2]) * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    return ask(Engine.load(sys.argv[1], verify=False))

in_a_child(under_a_limit)
print(ask(Engine.load(sys.argv[1])) != "")
"""
    refusal, works = lines_of(program, small_folder, str(more_mb))
    assert refusal.startswith("CapacityError")
    assert "more memory than this process can have" in refusal
    assert works == "True"


@pytest.mark.parametrize("cache_tokens", [10**12, 10**18, 10**30])
def test_a_pool_larger_than_memory_is_refused_by_its_option(small_folder: Path, cache_tokens: int) -> None:
    with pytest.raises(CapacityError, match="too little memory for cache_tokens") as caught:
        Engine.load(small_folder, verify=False, cache_tokens=cache_tokens, n_threads=1)
    assert "lower cache_tokens" in str(caught.value.fix)


def test_a_host_tier_larger_than_memory_is_refused_by_its_option(small_engine: Engine) -> None:
    with pytest.raises(CapacityError, match="too little memory for host_tokens"):
        engine_under(small_engine, small_policy("freekv"), host_tokens=10**15)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("std::bad_alloc"), RuntimeError("Failed to allocate memory")])
def test_memory_that_runs_out_in_a_step_ends_its_requests(
    error: Exception, small_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    (prompt,) = prompts_of(small_engine, (20,))
    expected = small_engine.generate(prompt, max_new_tokens=3)
    run = small_engine.runner.run

    def fail(_plan: Any) -> Any:
        monkeypatch.setattr(small_engine.runner, "run", run)
        raise error

    monkeypatch.setattr(small_engine.runner, "run", fail)
    with pytest.raises(CapacityError, match="a step needs more memory") as caught:
        small_engine.generate(prompt, max_new_tokens=3)
    assert "chunk" in str(caught.value.fix)
    assert small_engine.generate(prompt, max_new_tokens=3) == expected


LOST_PAGES = RecallError("pages cannot be read", got="Cannot allocate memory")


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    for error in (RuntimeError("a bug"), CapacityError("std::bad_alloc"), OSError("No space left on device"), LOST_PAGES):
        assert memory.memory_error(error, "a step") is None


@pytest.mark.parametrize("policy", ["prefixkv", "freekv"])
def test_after_close_every_use_is_refused_by_name(policy: str, small_engine: Engine) -> None:
    engine = engine_under(small_engine, small_policy(policy))
    prompts = prompts_of(engine, (37, 20))
    stream = engine.stream(prompts[0], max_new_tokens=30)
    waiting = engine.stream(prompts[1], max_new_tokens=30)
    next(stream)
    engine.close()
    for rest in (stream, waiting):
        with pytest.raises(EngineError, match="the engine was closed before the request had ended"):
            list(rest)
        rest.close()
    asks: list[Callable[[], object]] = [
        lambda: engine.generate(prompts[0]),
        lambda: engine.generate_batch(prompts),
        lambda: engine.stream(prompts[0]),
        lambda: engine.submit(prompts[0]),
    ]
    for ask in asks:
        with pytest.raises(UsageError, match="the engine has been closed"):
            ask()
    engine.close()
    assert_idle(engine)
