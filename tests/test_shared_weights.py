"""Engines of one checkpoint share the file of their weights, and nothing else; each is whole without the others."""

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.engines import build_for_test
from tests.test_manifest import signed
from trt_kv.cli.inspection import describe_engine
from trt_kv.digests import digest_of
from trt_kv.engine_files import verify_files
from trt_kv.errors import EngineError
from trt_kv.export import shared_weights
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.manifest import FILE_NAME, load_manifest
from trt_kv.policies import policy_from_name
from trt_kv.runtime.engine import Engine

PROMPT = "the old man"


@pytest.fixture
def build(small_checkpoint_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Builds an engine of a policy into ``engines/``, quickly."""
    (tmp_path / "engines").mkdir()

    def build_small(
        policy: str, name: str = "", *, checkpoint: Path | None = None, dtype: str = "float32", replace: bool = False
    ) -> Path:
        opened = open_checkpoint(checkpoint or small_checkpoint_folder)
        request = EngineRequest(checkpoint=opened, policy=policy_from_name(policy), page_size=5, dtype=dtype)
        return build_for_test(request, tmp_path / "engines" / (name or policy), replace=replace, share=True)

    return build_small


def weights(engine: Path) -> Path:
    return engine / "graphs" / "weights.data"


def is_shared(*engines: Path) -> bool:
    return len({weights(engine).stat().st_ino for engine in engines}) == 1


def text_of(engine: Path) -> str:
    with Engine.load(engine, cache_tokens=200) as loaded:
        return loaded.generate(PROMPT, max_new_tokens=8).text


def test_a_second_policy_takes_no_second_copy(build: Callable[..., Path], tmp_path: Path) -> None:
    """And the engine is, byte for byte, the one that is built alone."""
    first, second = build("full"), build("h2o")
    assert is_shared(first, second)
    assert weights(first).stat().st_nlink == 2
    alone = build("h2o", "elsewhere/h2o")
    assert not is_shared(first, alone)
    assert (alone / FILE_NAME).read_bytes() == (second / FILE_NAME).read_bytes()
    for engine in (first, second):
        verify_files(engine, load_manifest(engine))


def test_inspect_tells_what_is_shared(build: Callable[..., Path]) -> None:
    first = build("full")
    assert "shared" not in describe_engine(first)
    told = "shared    graphs/weights.data, 0.2 MiB: one file on the disk with 1 more names"
    for engine in (first, build("h2o")):
        assert told in describe_engine(engine)


def test_engines_are_deleted_in_any_order(build: Callable[..., Path]) -> None:
    engines = [build(policy, f"{policy} {number}") for policy in ("full", "h2o") for number in range(2)]
    assert is_shared(*engines)
    texts = {engine: text_of(engine) for engine in engines}
    for engine in (engines[0], engines[3]):
        shutil.rmtree(engine)
        del texts[engine]
        assert {left: text_of(left) for left in texts} == texts


def test_an_engine_that_is_replaced_keeps_its_weights(build: Callable[..., Path]) -> None:
    engine = build("full")
    inode = weights(engine).stat().st_ino
    assert build("h2o", "full", replace=True) == engine
    assert (weights(engine).stat().st_ino, weights(engine).stat().st_nlink) == (inode, 1)
    assert load_manifest(engine).policy.name == "h2o"


def test_other_weights_are_not_shared(build: Callable[..., Path], tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", sample="qwen3-biases", seed=9)
    engines = [build("full"), build("full", "half", dtype="bfloat16"), build("full", "other", checkpoint=other)]
    assert len({weights(engine).stat().st_ino for engine in engines}) == 3
    assert is_shared(build("full", "other again", checkpoint=other), engines[2])


def test_weights_are_compared_with_the_checkpoint_itself(build: Callable[..., Path]) -> None:
    """Neither a damaged file nor a manifest that lies about its model gets into another engine."""
    for number, wholly in enumerate((False, True)):
        engine = build("full", f"first {number}")
        weights(engine).chmod(0o644)
        content = bytearray(weights(engine).read_bytes())
        content[len(content) // 2] ^= 1
        weights(engine).unlink()
        weights(engine).write_bytes(content)
        if wholly:
            data = json.loads((engine / FILE_NAME).read_text())
            data["files"]["graphs/weights.data"]["digest"] = digest_of(weights(engine))
            (engine / FILE_NAME).write_text(json.dumps(signed(data)))
            verify_files(engine, load_manifest(engine))
        second = build("h2o", f"second {number}")
        assert not is_shared(engine, second)
        verify_files(second, load_manifest(second))
        shutil.rmtree(engine)
        shutil.rmtree(second)


def test_damage_in_place_is_found_in_both(build: Callable[..., Path]) -> None:
    """They are one file. It is read-only, so that nobody does this by accident."""
    first, second = build("full"), build("h2o")
    assert stat.filemode(weights(first).stat().st_mode) == "-r--r--r--"
    weights(first).chmod(0o644)
    with weights(first).open("r+b") as file:
        file.write(b"\xff")
    for engine in (first, second):
        with pytest.raises(EngineError, match=r"weights\.data is not the file that was built"):
            Engine.load(engine)
    third = build("full", "third")
    assert not is_shared(first, third)
    verify_files(third, load_manifest(third))


def test_without_links_weights_are_written(build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    first = build("full")

    def no_links(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    assert not is_shared(first, build("h2o"))


def test_an_engine_that_goes_while_it_is_looked_at_is_no_obstacle(
    build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build("full")
    original = shared_weights._weights_of

    def gone(engine: Path, *args: object) -> object:
        found = original(engine, *args)  # type: ignore[arg-type]
        shutil.rmtree(engine)
        return found

    monkeypatch.setattr(shared_weights, "_weights_of", gone)
    second = build("h2o")
    assert not first.exists()
    verify_files(second, load_manifest(second))


@pytest.mark.parametrize("what", ["no engine", "a build that runs", "somebody else's"])
def test_what_is_no_finished_engine_of_ours_is_not_linked(
    what: str, build: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build("full")
    match what:
        case "no engine":
            (first / FILE_NAME).write_text("{}")
        case "a build that runs":
            first = first.rename(first.with_name(".full.building-12ab"))
        case _:
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert not is_shared(first, build("h2o"))


BUILD = """
import sys
from pathlib import Path
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest, build_engine
from trt_kv.policies import policy_from_name

checkpoint, out = open_checkpoint(Path(sys.argv[1])), Path(sys.argv[2])
build_engine(EngineRequest(checkpoint=checkpoint, policy=policy_from_name(sys.argv[3])), out, replace=True)
"""


@pytest.mark.slow
def test_builds_at_once_share_or_do_not_but_are_whole(small_checkpoint_folder: Path, tmp_path: Path) -> None:
    """Processes that build engines of one checkpoint, two of them the same, while others of theirs are removed."""
    home = tmp_path / "engines"
    policies = ["full", "h2o", "streamingllm", "full"]
    for _ in range(2):
        processes = [
            subprocess.Popen([sys.executable, "-c", BUILD, str(small_checkpoint_folder), str(home / policy), policy])
            for policy in policies
        ]
        assert [process.wait(timeout=300) for process in processes] == [0] * len(processes)
        assert sorted(path.name for path in home.iterdir()) == sorted(set(policies))
        for policy in policies:
            verify_files(home / policy, load_manifest(home / policy))
        shutil.rmtree(home / "h2o")
