"""A build leaves a whole engine or nothing: on every failure, every interruption and a full disk."""

import errno
import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines import interrupted_at_line, prefixkv_request, traced_once
from trt_kv.cli.app import main
from trt_kv.engine_files import verify_files
from trt_kv.errors import CheckpointError, EngineError, RecipeError, UsageError
from trt_kv.export import engine as engine_module
from trt_kv.export import new_folder as new_folder_module
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest, build_engine
from trt_kv.export.new_folder import new_folder
from trt_kv.manifest import load_manifest
from trt_kv.policies import policy_from_name

OnProgress = Callable[[str, int, int], None]


@pytest.fixture(scope="module")
def request_(small_checkpoint_folder: Path) -> EngineRequest:
    return prefixkv_request(open_checkpoint(small_checkpoint_folder), (0.6, 0.3, 0.9), budget=0.6)


@pytest.fixture
def build(request_: EngineRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``build_engine`` of the small checkpoint, quick because its graphs are traced once."""

    def build_small(destination: Path, *, replace: bool = False, on_progress: OnProgress | None = None) -> None:
        build_engine(request_, destination, replace=replace, on_progress=on_progress)

    monkeypatch.setattr(engine_module, "graph_from_checkpoint", traced_once)
    return build_small


@pytest.fixture
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "engines"
    folder.mkdir()
    return folder


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fingerprint(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and modification time of every file: the very same files, untouched."""
    return {str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


def assert_whole_engine(folder: Path) -> None:
    verify_files(folder, load_manifest(folder))


def progress_calls(build: Callable[..., None], folder: Path) -> int:
    calls = []
    build(folder, on_progress=lambda *call: calls.append(call))
    shutil.rmtree(folder)
    return len(calls)


def raise_at_call(number: int, error: BaseException) -> OnProgress:
    calls = iter(range(number + 1))

    def on_progress(*_: Any) -> None:
        if next(calls) == number:
            raise error

    return on_progress


def test_ctrl_c_at_any_report_of_progress_leaves_nothing(build: Callable[..., None], home: Path) -> None:
    n_calls = progress_calls(build, home / "engine")
    assert n_calls > 10
    for number in range(n_calls):
        with pytest.raises(KeyboardInterrupt):
            build(home / "engine", on_progress=raise_at_call(number, KeyboardInterrupt()))
        assert contents(home) == []


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_line_of_a_build_leaves_nothing_half_made(stride: int, build: Callable[..., None], home: Path) -> None:
    """After the very last step the engine is whole, and stays; by default at every fifth line."""
    outcomes: list[list[str]] = []
    while interrupted_at_line(stride * len(outcomes), [engine_module], lambda: build(home / "engine")):
        outcomes.append(contents(home))
        if outcomes[-1]:
            assert_whole_engine(home / "engine")
            shutil.rmtree(home / "engine")
    assert stride * len(outcomes) > 20
    assert [outcome for outcome in outcomes if outcome] in ([["engine"]], [["engine"]] if stride == 1 else [])
    assert outcomes[-1] == ["engine"] or stride > 1


def test_a_failed_rebuild_leaves_the_old_engine_untouched(build: Callable[..., None], home: Path) -> None:
    build(home / "engine")
    before = fingerprint(home / "engine")
    n_calls = progress_calls(build, home / "other")
    for number, error in ((0, KeyboardInterrupt()), (n_calls // 2, SystemExit(143)), (n_calls - 1, ValueError("a bug"))):
        with pytest.raises(type(error)):
            build(home / "engine", replace=True, on_progress=raise_at_call(number, error))
        assert contents(home) == ["engine"]
        assert fingerprint(home / "engine") == before


def test_a_rebuild_takes_the_old_engines_place(build: Callable[..., None], home: Path) -> None:
    build(home / "engine")
    (home / "engine" / "notes.txt").write_text("of the old one")
    build(home / "engine", replace=True)
    assert contents(home) == ["engine"]
    assert_whole_engine(home / "engine")
    assert not (home / "engine" / "notes.txt").exists()


WRITTEN_FILES = (
    "graphs/weights.data",
    "graphs/prefill.onnx",
    "graphs/decode.onnx",
    "graphs/segment_01.onnx",
    "graphs/small_weights.data",
    "graphs/weights.json",
    "tokenizer.json",
)


@pytest.mark.parametrize("name", [*WRITTEN_FILES, "manifest.json"])
def test_a_full_disk_is_told_and_leaves_nothing(
    name: str, build: Callable[..., None], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is /dev/full in disguise: every write to it fails as on a full disk."""
    make = Path.mkdir

    def make_with_a_full_file(folder: Path, *arguments: Any, **options: Any) -> None:
        make(folder, *arguments, **options)
        full = folder / Path(name).name
        of_file = folder.name == Path(name).parent.name or (folder.name.startswith(".engine.building-") and "/" not in name)
        if of_file and not full.is_symlink():
            full.symlink_to("/dev/full")

    monkeypatch.setattr(Path, "mkdir", make_with_a_full_file)
    with pytest.raises(EngineError, match="the disk is full") as caught:
        build(home / "engine")
    assert "MiB free" in str(caught.value)
    assert "--out" in str(caught.value)
    assert contents(home) == []


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("owner", "function"), [(Path, "mkdir"), (Path, "rename"), (Path, "write_bytes"), (os, "fsync")])
def test_a_disk_that_fills_up_at_any_call_leaves_nothing(
    owner: Any, function: str, build: Callable[..., None], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, function, no_space)
    with pytest.raises((EngineError, RecipeError), match=r"the disk is full|No space left on device"):
        build(home / "engine")
    assert contents(home) == []


def test_a_full_disk_exits_with_1(
    small_checkpoint_folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine_module, "export_graphs", no_space)
    out = home / "engine"
    assert main(["build", "--policy", "full", "--checkpoint", str(small_checkpoint_folder), "--out", str(out)]) == 1
    said = capsys.readouterr().err
    assert f"error: the disk is full; nothing was left at {out}" in said
    assert "Traceback" not in said
    assert contents(home) == []


def test_a_folder_that_cannot_be_written_is_told(build: Callable[..., None], home: Path) -> None:
    (home / "file").write_text("in the way")
    with pytest.raises(EngineError, match=r"cannot write .*file/engine"):
        build(home / "file" / "engine")
    assert contents(home) == ["file"]


def test_a_checkpoint_that_cannot_be_read_is_told_as_that(
    small_checkpoint_folder: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not as a destination that cannot be written: the error has the errno of a bad disk, but no name of a file."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(small_checkpoint_folder, folder)
    monkeypatch.setattr(engine_module, "graph_from_checkpoint", traced_once)
    original = Path.open
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        request = EngineRequest(checkpoint=open_checkpoint(folder), policy=policy_from_name("full"))

        def broken_disk(path: Path, *args: Any, name: str = name, **options: Any) -> Any:
            if path == folder / name:
                raise OSError(errno.EIO, "Input/output error")
            return original(path, *args, **options)

        monkeypatch.setattr(Path, "open", broken_disk)
        with pytest.raises(CheckpointError, match=re.escape(f"cannot read {folder / name}")):
            build_engine(request, home / "engine")
        monkeypatch.setattr(Path, "open", original)
        assert contents(home) == []


def test_what_a_build_cannot_read_is_not_told_as_written(home: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot make .*engine") as caught, new_folder(home / "engine"):
        (tmp_path / "elsewhere" / "none").read_bytes()
    assert "elsewhere/none" in str(caught.value)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_something_else_at_the_destination_is_never_replaced(kind: str, build: Callable[..., None], home: Path) -> None:
    destination = home / "precious"
    match kind:
        case "file":
            destination.write_text("text")
        case "folder":
            destination.mkdir()
        case "dangling link":
            destination.symlink_to(home / "nowhere")
    for replace, said in ((False, "exists already"), (True, "is not an engine")):
        with pytest.raises(UsageError, match=said):
            build(destination, replace=replace)
        assert contents(home) == ["precious"]


def test_an_engine_behind_a_link_is_replaced_and_only_the_link_goes(build: Callable[..., None], home: Path) -> None:
    build(home / "real")
    (home / "link").symlink_to(home / "real")
    build(home / "link", replace=True)
    assert contents(home) == ["link", "real"]
    assert not (home / "link").is_symlink()
    assert_whole_engine(home / "real")


def write_generation(destination: Path, generation: str) -> None:
    """Stands in for a build: two files, the last one the manifest."""
    with new_folder(destination, replace=True) as folder:
        (folder / "graph").write_text(generation)
        (folder / "manifest.json").write_text(generation)


def test_ctrl_c_at_any_line_never_costs_the_old_engine(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever line is interrupted, a whole engine stands there, old or new, and the next build cleans up."""
    monkeypatch.setattr(new_folder_module, "LONGEST_WAIT_S", 0.005)  # this process lives on with locks that it did not release
    destination = home / "engine"
    number = 0
    while True:
        write_generation(destination, f"old {number}")
        assert contents(home) == ["engine"]
        rewrite = functools.partial(write_generation, destination, f"new {number}")
        interrupted = interrupted_at_line(number, [new_folder_module], rewrite)
        generations = {path.read_text() for path in destination.iterdir()}
        assert contents(destination) == ["graph", "manifest.json"]
        assert generations in ({f"old {number}"}, {f"new {number}"})
        if not interrupted:
            break
        number += 1
    assert number > 30
    assert generations == {f"new {number}"}


def test_leftovers_of_killed_builds_go_with_the_next_build(home: Path) -> None:
    for name in (".engine.building-12ab", ".engine.building-34cd.old", ".other.building-56ef", ".engine"):
        (home / name / "graphs").mkdir(parents=True)
    write_generation(home / "engine", "first")
    assert contents(home) == [".engine", ".engine.building-34cd.old", ".other.building-56ef", "engine"]
    write_generation(home / "engine", "second")
    assert contents(home) == [".engine", ".other.building-56ef", "engine"]


def test_a_build_that_still_runs_is_no_leftover(home: Path) -> None:
    with new_folder(home / "engine") as slow:
        write_generation(home / "engine", "fast")
        assert slow.is_dir()
        shutil.rmtree(home / "engine")
    assert contents(home) == ["engine"]


def test_of_two_builds_for_one_destination_the_later_is_refused(home: Path) -> None:
    slow = new_folder(home / "engine")
    (slow.__enter__() / "graph").write_text("slow")
    write_generation(home / "engine", "fast")
    with pytest.raises(UsageError, match="exists already"):
        slow.__exit__(None, None, None)
    assert (home / "engine" / "graph").read_text() == "fast"
    assert contents(home) == ["engine"]


WRITER = """
import random, sys, time
from pathlib import Path
from trt_kv.errors import UsageError
from trt_kv.export.new_folder import new_folder

destination, name, replace, n_times = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "replace", int(sys.argv[4])
random.seed(name)
print("up", flush=True)
sys.stdin.readline()
for number in range(n_times):
    try:
        with new_folder(destination, replace=replace) as folder:
            for file in ("graph", "manifest.json"):
                (folder / file).write_text(f"{name} {number}")
                time.sleep(random.random() / 1000)
        print(f"{name} {number}")
    except UsageError as error:
        print(error.what)
"""


def written_at_once(destination: Path, *, replace: bool, n_times: int) -> list[list[str]]:
    """What four processes say that write engines there at the same time, each ``n_times``; none may fail otherwise."""
    words = ["replace" if replace else "new", str(n_times)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(destination), str(number), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    ends = [(process.communicate(timeout=60), process.returncode) for process in processes]
    assert all(code == 0 for _, code in ends), ends
    return [out.splitlines() for (out, _), _ in ends]


def test_processes_that_replace_one_engine_do_not_lose_it(home: Path) -> None:
    said = written_at_once(home / "engine", replace=True, n_times=50)
    assert [len(lines) for lines in said] == [50] * 4
    assert not any("exists" in line for lines in said for line in lines)
    (generation,) = {path.read_text() for path in (home / "engine").iterdir()}
    assert generation in {lines[-1] for lines in said}
    assert contents(home) == ["engine"]


def test_of_processes_that_make_one_engine_one_wins(home: Path) -> None:
    for number in range(5):
        destination = home / str(number)
        said = sorted(line for lines in written_at_once(destination, replace=False, n_times=1) for line in lines)
        (*others, winner) = said
        assert others == [f"{destination} exists already"] * 3
        assert {path.read_text() for path in destination.iterdir()} == {winner}
    assert contents(home) == sorted(map(str, range(5)))


@pytest.fixture
def start_build(small_checkpoint_folder: Path, home: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``trt-kv build`` and waits until it writes (or ``early``: until Python has started)."""
    processes = []

    def start(*words: str, early: bool = False) -> subprocess.Popen[str]:
        code = "import sys; print('up', flush=True); from trt_kv.cli import main; sys.exit(main())"
        command = [sys.executable, "-c", code, "build", "--checkpoint", str(small_checkpoint_folder), "--policy", "full"]
        process = subprocess.Popen(
            [*command, "--out", str(home / "engine"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        if early:
            time.sleep(0.5)
            return process
        deadline = time.monotonic() + 60
        while not any(home.glob(".engine.building-*")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    ("number", "exit_code", "early"),
    [(signal.SIGINT, 130, True), (signal.SIGINT, 130, False), (signal.SIGTERM, 143, False)],
    ids=["ctrl-c while importing", "ctrl-c while building", "terminated"],
)
def test_a_signal_ends_a_build_and_leaves_nothing(
    number: int, exit_code: int, early: bool, start_build: Callable[..., subprocess.Popen[str]], home: Path
) -> None:
    process = start_build(early=early)
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == exit_code, said
    assert "Traceback" not in said
    assert contents(home) == []


def test_a_killed_build_leaves_nothing_that_loads(
    start_build: Callable[..., subprocess.Popen[str]], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = start_build()
    process.kill()
    process.wait()
    (leftover,) = home.iterdir()
    assert leftover.name.startswith(".engine.building-")
    assert main(["inspect", str(leftover)]) == 1
    assert "is not an engine" in capsys.readouterr().err
