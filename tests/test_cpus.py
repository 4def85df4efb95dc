"""The CPUs that a process may use, and the threads that compute."""

from pathlib import Path
from typing import Any

import numba
import pytest

from trt_kv.runtime import cpus, memory
from trt_kv.runtime.backends.host.executor import SplitStepExecutor
from trt_kv.runtime.cpus import threads_for, usable_cpus
from trt_kv.runtime.engine import Engine


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tree of control groups on a machine whose process may run on 8 CPUs."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "own").write_text("0::/a/b\n")
    return tmp_path


@pytest.mark.parametrize(
    ("own", "above", "expected"),
    [("max 100000", "max 100000", 8), ("250000 100000", "max 100000", 3), ("max 100000", "50000 100000", 1)],
)
def test_a_quota_of_any_control_group_counts(own: str, above: str, expected: int, groups: Path) -> None:
    (groups / "a" / "b" / "cpu.max").write_text(own)
    (groups / "a" / "cpu.max").write_text(above)
    assert usable_cpus() == expected


def test_version_1_has_two_files(groups: Path) -> None:
    (groups / "own").write_text("4:cpu,cpuacct:/c\n")
    (groups / "cpu" / "c").mkdir(parents=True)
    for name, value in (("cpu.cfs_quota_us", "400000"), ("cpu.cfs_period_us", "100000")):
        (groups / "cpu" / "c" / name).write_text(value)
    assert usable_cpus() == 4
    (groups / "cpu" / "c" / "cpu.cfs_quota_us").write_text("-1")
    assert usable_cpus() == 8


def test_threads_are_bounded_by_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpus, "usable_cpus", lambda: 5)
    assert [threads_for(n) for n in (0, 1, 5, 6, 1957)] == [5, 1, 5, 5, 5]


def test_kernels_run_in_as_many_threads_as_the_engine_was_given(small_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the caller's own kernels in as many as before."""
    seen, before = [], numba.get_num_threads()
    dense: Any = small_engine.runner._executor
    assert isinstance(dense, SplitStepExecutor)
    run = dense.dense.run

    def recording(*given: Any) -> Any:
        seen.append(numba.get_num_threads())
        return run(*given)

    monkeypatch.setattr(dense.dense, "run", recording)
    small_engine.generate([1, 5], max_new_tokens=2)
    assert set(seen) == {1}
    assert numba.get_num_threads() == before
