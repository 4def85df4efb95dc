"""What a run needs of the machine and leaves on it: no file behind, no folder that can be written but the one it is told."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numba
import pytest

from trt_kv.cli import main
from trt_kv.pipeline.environment import State, examine
from trt_kv.plugins import jit

COMMAND = "import sys; from trt_kv.cli import main; sys.exit(main())"
SETTINGS = ("HOME", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "NUMBA_CACHE_DIR", "MPLCONFIGDIR", "ORT_DISABLE_TELEMETRY")
ROOT = Path(__file__).parent.parent


def run_apart(
    words: Sequence[str | Path], *, cwd: Path, before: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run trt-kv in a process of its own, in ``cwd``, with only ``environment`` of ``SETTINGS``."""
    folders = (
        "HOME",
        "TMPDIR",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "NUMBA_CACHE_DIR",
        "MPLCONFIGDIR",
        "ORT_DISABLE_TELEMETRY",
    )
    kept = {name: value for name, value in os.environ.items() if name not in folders}
    command = [*before, sys.executable, "-c", COMMAND, *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=kept | environment, capture_output=True, text=True, check=False)


def files_in(folder: Path) -> list[Path]:
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


def test_a_run_leaves_no_file_behind(small_folder: Path, tmp_path: Path) -> None:
    """Neither in the home folder nor in the temporary one: no telemetry of any library."""
    out = tmp_path / "out"
    home = tmp_path / "home"
    out.mkdir()
    home.mkdir()
    for words in (
        ("generate", small_folder, "the old storm", "--max-new-tokens", "1"),
        ("doctor",),
        ("build", "--policy", "full", "--out", out / "engine"),
    ):
        done = run_apart(words, cwd=out, HOME=str(home), TMPDIR=str(home), PYTHONPATH=str(ROOT))
        assert done.returncode == 0, done.stderr
        assert files_in(home) == []


@pytest.mark.parametrize(("setting", "expected"), [({}, "1"), ({"ORT_DISABLE_TELEMETRY": "0"}, "0")], ids=str)
def test_the_users_setting_of_telemetry_is_respected(setting: dict[str, str], expected: str, tmp_path: Path) -> None:
    code = "import os, trt_kv.runtime.backends.onnx_runtime; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    kept = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    environment = kept | setting | {"HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]


@pytest.fixture
def read_only(tmp_path: Path) -> Path:
    """An installation that cannot be written, without compiled kernels, and an empty home folder next to it."""
    shutil.copytree(ROOT / "trt_kv", tmp_path / "site" / "trt_kv", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    for path in (*(tmp_path / "site").rglob("*"), tmp_path / "site", tmp_path / "home"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return tmp_path


def without_privileges() -> list[str]:
    """Words before a command that keep root, too, from writing what is read-only."""
    if os.geteuid() != 0:
        return []
    if shutil.which("setpriv") is None:
        pytest.skip("root can write everything, and there is no setpriv to prevent it")
    return ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]


def as_service_user(words: Sequence[str | Path], place: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run trt-kv of the installation ``read_only`` in its folder ``work``, the only one that can be written."""
    folders = {"HOME": str(place / "home"), "PYTHONPATH": str(place / "site"), "TMPDIR": str(place / "work")}
    done = run_apart(words, cwd=place / "work", before=without_privileges(), **(folders | environment))
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_service_user_who_can_write_nothing_generates(small_folder: Path, read_only: Path) -> None:
    """It takes longer, which is told once."""
    done = as_service_user(("generate", small_folder, "the old storm", "--max-new-tokens", "2"), read_only)
    assert done.stderr.count("cannot be cached") == 1


@pytest.mark.slow
def test_a_service_user_builds_with_pictures_and_asks_the_doctor(read_only: Path) -> None:
    done = as_service_user(("build", "--policy", "prefixkv", "--out", "engine"), read_only)
    assert "atplotlib" not in done.stderr
    done = as_service_user(("doctor",), read_only)
    assert "each run compiles its kernels" in done.stdout
    assert str(read_only / "site") in done.stdout


@pytest.mark.slow
def test_kernels_are_cached_where_the_user_says(read_only: Path, small_folder: Path) -> None:
    kernels = read_only / "work" / "kernels"
    words = ("generate", small_folder, "the old storm", "--max-new-tokens", "1")
    done = as_service_user(words, read_only, NUMBA_CACHE_DIR=str(kernels))
    assert "cannot be cached" not in done.stderr
    assert list(kernels.rglob("*.nbi"))


def test_doctor_tells_where_kernels_are_cached(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def found() -> tuple[State, str]:
        (finding,) = [finding for finding in examine() if finding.name == "cache of kernels"]
        return finding.state, finding.text

    assert found() == (State.OK, str(jit.cache_folder()))
    monkeypatch.setattr(jit, "cache_folder", lambda: None)
    assert found()[0] is State.OPTIONAL
    assert main(["doctor"]) == 0
    assert "NUMBA_CACHE_DIR" in capsys.readouterr().out


def test_another_failure_of_a_kernel_is_not_taken_for_a_missing_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(numba, "njit", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        jit.njit()(len)
