"""How much memory is planned with: what control groups leave, what weights take, and never more than there is."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving import engine_under, small_policy
from trt_kv.errors import UsageError
from trt_kv.runtime import memory
from trt_kv.runtime.backends.host import load as host_load
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.loading import LoadOptions

MB = 2**20


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8000 MB available and no control groups."""
    (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {8000 * 1024} kB\n")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "OWN_CGROUPS", tmp_path / "own")
    return tmp_path


def version_2(machine: Path, group: str, *, limit: str, used: int, inactive: int = 0) -> None:
    folder = machine / "cgroup" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\nfile 7\nactive_file {3 * MB}\ninactive_file {inactive}\n")


def version_1(machine: Path, group: str, *, limit: int, used: int, inactive: int = 0) -> None:
    folder = machine / "cgroup" / "memory" / group
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.limit_in_bytes").write_text(f"{limit}\n")
    (folder / "memory.usage_in_bytes").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 1\ninactive_file 1\ntotal_inactive_file {inactive}\n")


def belongs_to(machine: Path, *lines: str) -> None:
    (machine / "own").write_text("".join(f"{line}\n" for line in lines))


def test_without_control_groups_what_the_kernel_says_is_available(machine: Path) -> None:
    assert memory.available_bytes() == 8000 * MB
    belongs_to(machine, "0::/a/group")
    assert memory.available_bytes() == 8000 * MB, "a group without a memory controller"


def test_the_tightest_of_nested_limits_holds(machine: Path) -> None:
    belongs_to(machine, "0::/outer/inner")
    version_2(machine, "outer", limit=str(500 * MB), used=300 * MB)
    version_2(machine, "outer/inner", limit=str(900 * MB), used=100 * MB)
    assert memory.available_bytes() == 200 * MB
    version_2(machine, "outer/inner", limit=str(150 * MB), used=100 * MB)
    assert memory.available_bytes() == 50 * MB
    version_2(machine, "outer/inner", limit="max", used=100 * MB)
    assert memory.available_bytes() == 200 * MB


def test_inside_a_container_the_root_is_the_limit(machine: Path) -> None:
    belongs_to(machine, "0::/")
    version_2(machine, "", limit=str(70 * MB), used=30 * MB)
    assert memory.available_bytes() == 40 * MB
    belongs_to(machine, "0::/../../somewhere/else")
    assert memory.available_bytes() == 40 * MB


def test_file_caches_that_would_be_dropped_are_free(machine: Path) -> None:
    belongs_to(machine, "0::/g")
    version_2(machine, "g", limit=str(100 * MB), used=95 * MB, inactive=60 * MB)
    assert memory.available_bytes() == 65 * MB
    version_2(machine, "g", limit=str(100 * MB), used=20 * MB, inactive=60 * MB)
    assert memory.available_bytes() == 100 * MB, "counters are not read at one moment: never more than the limit"
    version_2(machine, "g", limit=str(100 * MB), used=120 * MB)
    assert memory.available_bytes() == 0


def test_version_1_counts_what_is_below_a_group(machine: Path) -> None:
    belongs_to(machine, "12:cpu,cpuacct:/x", "5:memory:/outer/inner", "1:name=systemd:/y", "0::/z")
    version_1(machine, "outer", limit=300 * MB, used=250 * MB, inactive=20 * MB)
    version_1(machine, "outer/inner", limit=2**63 - 4096, used=10 * MB)
    assert memory.available_bytes() == 70 * MB
    belongs_to(machine, "5:memory:/docker/0123")
    version_1(machine, "", limit=90 * MB, used=30 * MB)
    assert memory.available_bytes() == 60 * MB, "in a container the group's own path is not there, its root is"


@pytest.mark.parametrize("file", ["memory.max", "memory.current", "memory.stat"])
def test_files_that_say_nothing_are_passed_over(file: str, machine: Path) -> None:
    belongs_to(machine, "0::/outer/inner")
    version_2(machine, "outer", limit=str(500 * MB), used=300 * MB)
    version_2(machine, "outer/inner", limit=str(10 * MB), used=3 * MB)
    (machine / "cgroup/outer/inner" / file).unlink()
    assert memory.available_bytes() == 200 * MB
    (machine / "cgroup/outer/inner" / file).write_text("nonsense\n")
    assert memory.available_bytes() == 200 * MB


def test_where_nothing_is_told_it_is_all_physical_memory(machine: Path) -> None:
    (machine / "meminfo").unlink()
    assert memory.available_bytes() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_weights_that_are_mapped_are_not_free(machine: Path) -> None:
    assert memory.free_for_cache(3000 * MB) == 5000 * MB
    assert memory.free_for_cache(9000 * MB) == 0


def test_loading_subtracts_the_weights(small_folder: Path, small_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def free_for_cache(mapped_bytes: int) -> int:
        asked.append(mapped_bytes)
        return 10 * MB

    monkeypatch.setattr(host_load, "free_for_cache", free_for_cache)
    Engine.load(small_folder, n_threads=1)
    files = small_engine.manifest.files
    assert asked == [sum(record.n_bytes for name, record in files.items() if name.endswith(".data"))]
    assert asked[0] > 0


def pinned(n_bytes: int, small_engine: Engine, **options: Any) -> tuple[int, int]:
    """Bytes of the pool and of the tier that are planned where ``n_bytes`` are free."""
    with engine_under(small_engine, small_policy("freekv")) as engine:
        config = dataclasses.replace(engine.manifest.config, max_positions=10**7)
        manifest = dataclasses.replace(engine.manifest, config=config)
    pool, recall = host_load._memory(manifest, LoadOptions(**options), n_bytes)
    assert recall is not None
    planned = pool.n_pages * pool.page_bytes, recall.host.n_pages * recall.host.page_bytes
    recall.close()
    return planned


@settings(max_examples=12)
@given(n_mb=st.integers(1, 60), cache_tokens=st.none() | st.integers(1, 9000), host_tokens=st.none() | st.integers(1, 9000))
def test_pool_and_tier_together_take_at_most_what_is_free(
    small_engine: Engine, n_mb: int, cache_tokens: int | None, host_tokens: int | None
) -> None:
    pool, host = pinned(n_mb * MB, small_engine, cache_tokens=cache_tokens, host_tokens=host_tokens)
    given_bytes = (pool if cache_tokens is not None else 0) + (host if host_tokens is not None else 0)
    one_token = 3 * 5 * 2 * 2 * 16 * 4 + 4096  # a page in each of the three layers, at least
    found = pool + host - given_bytes
    assert found <= max(0, n_mb * MB - given_bytes) + 2 * one_token
    if cache_tokens is None and host_tokens is None:
        assert n_mb * MB / 4 <= pool + host <= n_mb * MB, "and not much less"


def test_sizes_that_are_given_are_kept(small_engine: Engine) -> None:
    """Whatever is free: who names a number gets it."""
    small, large = (pinned(n_bytes, small_engine, cache_tokens=333, host_tokens=777) for n_bytes in (0, 100 * MB))
    assert small == large
    with engine_under(small_engine, small_policy("freekv"), cache_tokens=333, host_tokens=777) as engine:
        assert engine.runner.pool.n_pages == 3 * -(-333 // 5)
        assert engine.runner.tiers is not None
        n_host_layers = len(engine.runner._host_layers)
        assert engine.runner.tiers.host.n_pages == n_host_layers * -(-777 // 5)


def test_a_tier_in_a_file_takes_no_memory_from_the_pool(small_engine: Engine, tmp_path: Path) -> None:
    in_memory, _ = pinned(40 * MB, small_engine)
    beside_a_file, _ = pinned(40 * MB, small_engine, host_tier=f"file:{tmp_path}", host_tokens=100)
    assert beside_a_file > 1.5 * in_memory


@pytest.mark.parametrize("host_tokens", [0, -5])
def test_a_tier_without_tokens_is_refused(host_tokens: int, small_engine: Engine) -> None:
    with pytest.raises(UsageError, match="bad host_tokens"):
        pinned(MB, small_engine, host_tokens=host_tokens)
