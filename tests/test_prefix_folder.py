"""What folders of prefixes hold is told, and removed, by what their files say: other prefixes keep what they begin with."""

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines import Run
from trt_kv.errors import UsageError
from trt_kv.pipeline import PrefixRemoval, list_prefixes, remove_prefixes
from trt_kv.runtime.prefix import cache as module
from trt_kv.runtime.prefix.block_file import About, about_of, encoded, file_name
from trt_kv.runtime.prefix.cache import PromptKeys
from trt_kv.runtime.prefix.store import PrefixStore

SIZE = 20
ENGINES = ("sha256:" + "a" * 64, "sha256:" + "b" * 64)


def key_of(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def put(folder: Path, *names: str, engine: int = 0, policy: str = "full", at: int = 0) -> None:
    """The blocks of a prompt: blocks of the same name are those of another one too. ``at``: seconds of their last use."""
    store = PrefixStore(folder)
    for index, name in enumerate(names):
        after = key_of(names[index - 1]).hex() if index else ""
        about = About(engine=ENGINES[engine], policy=policy, tokens=(index + 1) * SIZE, own_tokens=SIZE, after=after)
        store.put(key_of(name), {"kv.0": np.zeros(1000 * (index + 1), np.float32)}, about)
        os.utime(folder / file_name(key_of(name)), (at, at))


def size(folder: Path, *names: str) -> int:
    return sum((folder / file_name(key_of(name))).stat().st_size for name in names)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two prompts that begin alike, one of another engine, and one whose beginning is gone."""
    put(tmp_path, "system", "one", "end", at=100)
    put(tmp_path, "system", "two", at=300)
    put(tmp_path, "other", engine=1, policy="h2o", at=200)
    put(tmp_path, "gone", "lost", at=50)
    (tmp_path / file_name(key_of("gone"))).unlink()
    return tmp_path


def test_each_prompt_is_one_prefix_and_shared_files_are_nobodys_alone(folder: Path) -> None:
    found = list_prefixes(folder)
    told = [(one.key, one.tokens, one.policy, one.used, one.is_whole) for one in found.prefixes]
    assert told == [
        (key_of("two").hex(), 40, "full", 300.0, True),
        (key_of("other").hex(), 20, "h2o", 200.0, True),
        (key_of("end").hex(), 60, "full", 100.0, True),
        (key_of("lost").hex(), 40, "full", 50.0, False),
    ]
    two, _, end, _ = found.prefixes
    assert (two.n_bytes, two.own_bytes) == (size(folder, "system", "two"), size(folder, "two"))
    assert (end.n_bytes, end.own_bytes) == (size(folder, "system", "one", "end"), size(folder, "one", "end"))
    assert found.n_bytes == size(folder, "system", "one", "end", "two", "other", "lost")
    assert [one.engine for one in list_prefixes(folder, engine="bbb").prefixes] == [ENGINES[1]]
    assert list_prefixes(folder, engine="c").prefixes == ()


def test_a_removed_prefix_takes_its_own_files_alone(folder: Path) -> None:
    before = {path.name for path in folder.iterdir()}
    key = key_of("end").hex()
    freed = size(folder, "one", "end")
    assert remove_prefixes(PrefixRemoval(folder=folder, keys=(key[:8].upper(),))) == (1, freed)
    assert before - {path.name for path in folder.iterdir()} == {file_name(key_of("one")), file_name(key_of("end"))}
    freed = size(folder, "system", "two")
    assert remove_prefixes(PrefixRemoval(folder=folder, keys=(key_of("two").hex(), key_of("two").hex()))) == (1, freed)
    assert remove_prefixes(PrefixRemoval(folder=folder, engine=ENGINES[1][:12]))[0] == 1
    assert [path.name for path in folder.iterdir()] == [file_name(key_of("lost"))]


def test_everything_goes_and_nothing_that_is_no_prefix(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    (folder / "kept.prefix").mkdir()
    (folder / "link.prefix").symlink_to(folder / "notes.txt")
    (folder / file_name(key_of("old"))).write_bytes(b"trt-kv prefix 1\n" + bytes(99))
    (folder / file_name(key_of("cut"))).write_bytes(b"trt-kv prefix 2\n")
    circle = {"one": "two", "two": "one"}
    for name, after in circle.items():
        about = About(engine="", policy="", tokens=SIZE, own_tokens=SIZE, after=key_of(f"circle {after}").hex())
        key = key_of(f"circle {name}")
        (folder / file_name(key)).write_bytes(b"".join(encoded(key, {}, about)))
    found = list_prefixes(folder)
    assert {path.stem for path in found.others} == {key_of("old").hex(), key_of("cut").hex()}
    n_removed, n_bytes = remove_prefixes(PrefixRemoval(folder=folder, everything=True))
    assert (n_removed, n_bytes) == (4, found.n_bytes)
    assert {path.name for path in folder.iterdir()} == {"notes.txt", "kept.prefix", "link.prefix"}


def test_what_names_no_prefix_is_refused(folder: Path, tmp_path: Path) -> None:
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({}, "not clear"),
        ({"keys": ("f" * 8,), "everything": True}, "not clear"),
        ({"keys": ("f" * 7,)}, "too short"),
        ({"keys": ("f" * 64,)}, "there is no prefix with this key"),
        ({"keys": (key_of("one").hex(),)}, "there is no prefix with this key"),  # of a block in the middle
        ({"folder": tmp_path / "nowhere", "everything": True}, "no folder of prefixes"),
    )
    before = sorted(folder.iterdir())
    for given, match in refused:
        with pytest.raises(UsageError, match=match):
            remove_prefixes(PrefixRemoval(**({"folder": folder} | given)))
    key = key_of("two").hex()
    twin = folder / f"{key[:9]}{'0' * 55}.prefix"
    twin.write_bytes((folder / f"{key}.prefix").read_bytes())
    with pytest.raises(UsageError, match="more than one prefix"):
        remove_prefixes(PrefixRemoval(folder=folder, keys=(key[:9],)))
    twin.unlink()
    assert sorted(folder.iterdir()) == before


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="users own files on POSIX only")
def test_files_of_other_users_are_no_prefixes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    found = list_prefixes(folder)
    assert (found.prefixes, len(found.others)) == ((), 6)


def test_a_file_tells_what_it_is_of_or_nothing(tmp_path: Path) -> None:
    key, about = key_of("x"), About(engine=ENGINES[0], policy="full", tokens=40, own_tokens=20, after="")
    head, body = encoded(key, {"kv.0": np.zeros(9)}, about)
    file = tmp_path / file_name(key)
    file.write_bytes(head + body)
    assert about_of(file) == about
    text = json.dumps(dataclasses.asdict(about) | {"tokens": "many"}).encode()
    for damaged in (b"", head, head + b"\xff" * 90, head + len(text).to_bytes(4, "big") + text, b"x" + head[1:] + body):
        file.write_bytes(damaged)
        assert about_of(file) is None


def test_a_blocks_key_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[bytes] = []

    class Counted:
        @staticmethod
        def sha256(data: bytes) -> Any:
            computed.append(data)
            return hashlib.sha256(data)

    monkeypatch.setattr(module, "hashlib", Counted)
    keys = PromptKeys(bytes(32), list(range(87)), SIZE)
    assert [len(keys.of_first(n_tokens)) for n_tokens in (-3, 0, 19, 20, 60, 59, 87, 999)] == [0, 0, 0, 1, 3, 2, 4, 4]
    assert keys.of_first(40) == keys.of_first(87)[:2]
    assert len(computed) == 4
    assert PromptKeys(bytes(32), list(range(40)), SIZE).of_first(40) == keys.of_first(40)
    assert PromptKeys(bytes([1] * 32), list(range(40)), SIZE).of_first(20) != keys.of_first(20)


def test_the_command_lists_and_removes(folder: Path, run: Run) -> None:
    code, out, err = run("prefix", "list", folder)
    assert (code, len(out.splitlines()), "4 prefixes" in err) == (0, 5, True)
    assert out.splitlines()[1].startswith(f"{key_of('two').hex()[:12]}      40 ")
    assert "h2o, bbbbbbbbbbbb" in out
    assert out.count("its beginning is gone") == 1
    document = json.loads(run("prefix", "list", folder, "--json", "--engine", ENGINES[1])[1])
    assert [(one["key"], one["tokens"]) for one in document["prefixes"]] == [(key_of("other").hex(), 20)]
    code, out, err = run("prefix", "remove", folder, key_of("end").hex()[:12])
    assert (code, out, "removed: 1 prefixes" in err) == (0, "", True)
    assert run("prefix", "remove", folder)[0] == 2
    assert run("prefix", "remove", folder, "--all")[0] == 0
    assert list(folder.iterdir()) == []
    code, out, err = run("prefix", "list", folder)
    assert (code, out, "[0 prefixes" in err) == (0, "", True)
