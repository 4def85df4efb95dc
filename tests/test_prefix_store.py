"""Files of prefix blocks: what was written is found again, and what is not what was written is never used."""

import errno
import logging
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines import random_ids
from tests.serving import engine_under, small_policy
from trt_kv.errors import UsageError
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.generation import Generation
from trt_kv.runtime.prefix import store as store_module
from trt_kv.runtime.prefix.block_file import MAGIC, About, digest
from trt_kv.runtime.prefix.store import PrefixStore, block_files

CHUNK = 20
KEYS = [bytes([at]) * 32 for at in range(4)]
ABOUT = About(engine="sha256:0", policy="h2o", tokens=20, own_tokens=20)
BLOCK = {"kv.0": np.arange(60, dtype=np.float32).reshape(3, 20), "scores.0": np.ones((1, 7), np.float32)}


@dataclass(frozen=True)
class Written:
    """An engine that forgets what it has in memory before each request, its store, and the right result."""

    engine: Engine
    store: Path
    expected: Generation

    def again(self) -> Generation:
        assert self.engine.core.prefixes is not None
        self.engine.core.prefixes.clear()
        return self.engine.generate(prompt_of(self.engine), max_new_tokens=4, ignore_eos=True)

    @property
    def first(self) -> Path:
        """The file of the first block of the prompt."""
        assert self.engine.core.prefixes is not None
        key = self.engine.core.prefixes.keys(prompt_of(self.engine), "")[0]
        return self.store / f"{key.hex()}.prefix"


@pytest.fixture(scope="module")
def written(small_engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    store = tmp_path_factory.mktemp("store")
    with opened(small_engine, store) as engine:
        yield Written(engine, store, engine.generate(prompt_of(engine), max_new_tokens=4, ignore_eos=True))


def prompt_of(engine: Engine) -> list[int]:
    return random_ids(engine, 61, seed=1)


def opened(dense: Engine, store: Path, **options: Any) -> Engine:
    given = {"chunk": CHUNK, "prefix_cache": True, "prefix_store": str(store)} | options
    return engine_under(dense, small_policy("h2o"), **given)


def files(store: Path) -> list[Path]:
    return sorted(store.glob("*.prefix"))


def again(dense: Engine, store: Path, **options: Any) -> Generation:
    with opened(dense, store, **options) as engine:
        return engine.generate(prompt_of(engine), max_new_tokens=4, ignore_eos=True)


@pytest.mark.parametrize("kv_dtype", ["float32", "int8", "bfloat16"])
def test_another_engine_continues_from_what_one_has_written(small_engine: Engine, tmp_path: Path, kv_dtype: str) -> None:
    first, second = (again(small_engine, tmp_path, kv_dtype=kv_dtype) for _ in range(2))
    assert (first.n_cached_tokens, second.n_cached_tokens) == (0, 60)
    assert second == first


def test_engines_that_differ_share_a_folder_and_no_block(small_engine: Engine, tmp_path: Path) -> None:
    results = [again(small_engine, tmp_path, **changes) for changes in ({}, {"kv_dtype": "int8"}, {"chunk": 15}, {})]
    assert [result.n_cached_tokens for result in results] == [0, 0, 0, 60]
    assert results[3] == results[0]
    assert len(files(tmp_path)) == 3 + 3 + 4


def rewritten(change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]) -> Callable[[Path], None]:
    """A file with the right digest of something else."""

    def damage(file: Path) -> None:
        key = bytes.fromhex(file.stem)
        store = PrefixStore(file.parent)
        block = store.get(key)
        assert block is not None
        file.unlink()
        store.put(key, change(dict(block)), ABOUT)

    return damage


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def replace_by_pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def swap(file: Path) -> None:
    """The block of another prefix, whole, under this name."""
    shutil.copy(next(one for one in files(file.parent) if one != file), file)


def no_block(file: Path) -> None:
    """The right digest of no block at all."""
    body = b"\xff" * 100
    file.write_bytes(MAGIC + digest(bytes.fromhex(file.stem), body) + body)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "cut in its head": lambda file: file.write_bytes(file.read_bytes()[:30]),
    "another version": lambda file: file.write_bytes(b"trt-kv prefix 1\n" + file.read_bytes()[16:]),
    "a flipped digest": lambda file: flip(file, 20),
    "a flipped header": lambda file: flip(file, 60),
    "a flipped value": lambda file: flip(file, -9),
    "another prefix": swap,
    "no block": no_block,
    "a missing array": rewritten(lambda block: {name: block[name] for name in block if name != "kv.1"}),
    "too few pages": rewritten(lambda block: block | {"kv.1": block["kv.1"][:-1]}),
    "another type": rewritten(lambda block: block | {"kv.1": block["kv.1"].astype(np.float64)}),
    "scores of another prefix": rewritten(lambda block: block | {"scores.0": block["scores.0"][:-1]}),
    "a folder": replace_by_folder,
}
if hasattr(os, "mkfifo"):
    DAMAGES["a pipe that nobody writes to"] = replace_by_pipe


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_file_is_a_miss_with_a_warning(
    written: Written, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    assert written.again().n_cached_tokens == 60
    damage(written.first)
    with caplog.at_level(logging.WARNING):
        found = written.again()
    assert (found, found.n_cached_tokens) == (written.expected, 0)
    assert "prefix store:" in caplog.text
    if damage is replace_by_folder:
        written.first.rmdir()
        written.again()
    assert written.again().n_cached_tokens == 60, "it has not been written again"


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users own files on POSIX only")
def test_files_of_others_are_not_read_and_others_read_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = PrefixStore(tmp_path / "made" / "here")
    store.put(KEYS[0], BLOCK, ABOUT)
    (file,) = files(tmp_path / "made" / "here")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file.parent, file)] == [0o700, 0o600]
    assert store.get(KEYS[0]) is not None
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert store.get(KEYS[0]) is None


def test_a_process_that_is_killed_leaves_no_file_that_looks_whole(tmp_path: Path) -> None:
    program = """
import os, signal, sys
import numpy as np
from pathlib import Path
from trt_kv.runtime.prefix.store import PrefixStore
os.replace = os.rename = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
from trt_kv.runtime.prefix.block_file import About
about = About(engine="", policy="full", tokens=20, own_tokens=20)
PrefixStore(Path(sys.argv[1])).put(bytes(32), {"kv.0": np.ones(999, np.float32)}, about)
"""
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode < 0
    (left,) = tmp_path.iterdir()
    assert left.suffix == ".part"
    assert PrefixStore(tmp_path).get(bytes(32)) is None
    assert left.exists(), "another process may still be writing it"
    os.utime(left, (0, 0))
    PrefixStore(tmp_path)
    assert not left.exists()


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No file can be written any more."""

    def refuse(descriptor: int, *_: Any) -> Any:
        os.close(descriptor)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdopen", refuse)
        yield


@pytest.mark.usefixtures("full_disk")
def test_on_a_full_disk_requests_go_on(small_engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(small_engine, tmp_path) as engine, caplog.at_level(logging.WARNING):
        results = [engine.generate(prompt_of(engine), max_new_tokens=4, ignore_eos=True) for _ in range(2)]
    assert [result.n_cached_tokens for result in results] == [0, 60]
    assert "No space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_the_files_of_the_least_recently_used_prefix_are_deleted_its_end_first(tmp_path: Path) -> None:
    store = PrefixStore(tmp_path)
    store.put(KEYS[0], BLOCK, ABOUT)
    store.capacity_bytes = 3 * store.used_bytes
    (tmp_path / "ff.prefix").mkdir()
    for key in KEYS[1:3]:
        store.put(key, BLOCK, ABOUT)
    store.touch(KEYS[:2])
    store.touch(KEYS[2:3])
    store.put(KEYS[3], BLOCK, ABOUT)
    assert [store.get(key) is not None for key in KEYS] == [True, False, True, True]
    store.put(KEYS[1], BLOCK | {"kv.0": np.zeros(9999, np.float32)}, ABOUT)  # larger than all of the store
    assert [store.get(key) is not None for key in KEYS] == [True, False, True, True]


def test_a_folder_with_much_room_is_not_listed_for_every_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[Path] = []

    def counted(folder: Path) -> list[tuple[int, int, Path]]:
        listed.append(folder)
        return block_files(folder)

    monkeypatch.setattr(store_module, "block_files", counted)
    store = PrefixStore(tmp_path)
    store.put(bytes(32), BLOCK, ABOUT)
    n_bytes = store.used_bytes
    store.capacity_bytes, listed[:] = 100 * n_bytes, []
    for at in range(150):
        store.put(bytes([1 + at]) * 32, BLOCK, ABOUT)
        assert sum(size for _, size, _ in block_files(tmp_path)) <= store.capacity_bytes
    assert len(listed) < 110  # each of the last ones replaces another
    listed.clear()
    for key in range(140):
        store._file(bytes([1 + key]) * 32).unlink(missing_ok=True)
    for at in range(200, 212):
        store.put(bytes([at]) * 32, BLOCK, ABOUT)
    assert 1 <= len(listed) <= 3


def test_a_path_that_is_no_folder_is_refused(small_engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="prefix store cannot be written"):
            opened(small_engine, path)
