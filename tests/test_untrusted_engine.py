"""An engine folder may come from anybody: it makes the runtime open its own files only, and nothing before it is checked."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import onnx
import pytest

from tests.test_manifest import signed
from trt_kv.cli.app import main
from trt_kv.cli.inspection import describe_engine
from trt_kv.digests import digest_of
from trt_kv.errors import EngineError, TrtKvError, UsageError
from trt_kv.json_file import MAX_DOCUMENT_BYTES
from trt_kv.manifest import FILE_NAME, MAX_TOKENIZER_BYTES, recorded_digest
from trt_kv.runtime.async_engine import AsyncEngine
from trt_kv.runtime.engine import Engine
from trt_kv.safe_path import safe_join

Document = dict[str, Any]


def rewrite(folder: Path, change: Callable[[Document], object]) -> None:
    """Change the manifest, and sign it as a build would."""
    data = json.loads((folder / FILE_NAME).read_text())
    change(data)
    (folder / FILE_NAME).write_text(json.dumps(signed(data)))


def list_again(folder: Path, *names: str) -> None:
    """Give files their size and digest in the manifest, as their author would."""

    def change(data: Document) -> None:
        for name in names:
            data["files"][name] = {"digest": digest_of(folder / name), "n_bytes": (folder / name).stat().st_size}

    rewrite(folder, change)


@pytest.fixture(params=[True, False], ids=["verified", "not verified"])
def load(request: pytest.FixtureRequest) -> Callable[..., Engine]:
    """``Engine.load`` with and without digests."""
    return lambda folder, **options: Engine.load(folder, verify=request.param, cache_tokens=200, **options)


@pytest.fixture
def outside(small_folder: Path, tmp_path: Path) -> Path:
    """The same graphs, beside the engine."""
    folder = tmp_path / "outside"
    shutil.copytree(small_folder / "graphs", folder)
    return folder


def test_a_signed_copy_loads(broken: Path, load: Callable[..., Engine]) -> None:
    """What the other tests change is what is refused."""
    rewrite(broken, lambda data: data)
    list_again(broken, "graphs/weights.json")
    assert load(broken).generate("the old man", max_new_tokens=2).token_ids


NAMES = [
    "../outside/{}",
    "{outside}/{}",
    "./{}",
    "..",
    ".",
    "",
    "graphs//{}",
    "a/../{}",
    "..\\outside\\{}",
    "{}\x00",
    "\x1b[31m{}",
]


@pytest.mark.parametrize("name", NAMES, ids=repr)
@pytest.mark.parametrize("place", ["files", "segment", "weights", "recipe's folder"])
def test_names_that_leave_the_folder_are_refused(
    name: str, place: str, broken: Path, outside: Path, load: Callable[..., Engine]
) -> None:
    record = json.loads((broken / FILE_NAME).read_text())["files"]["graphs/weights.data"]
    bad = name.format("segment_00.onnx" if place == "segment" else "weights.data", outside=outside)
    match place:
        case "files":
            rewrite(broken, lambda data: data["files"].update({bad: record}))
        case "segment":
            rewrite(broken, lambda data: data["segments"][0].update(file=bad))
        case "weights":
            path = broken / "graphs" / "weights.json"
            index = json.loads(path.read_text())
            index["weights"][0]["file"] = bad
            path.write_text(json.dumps(index))
            list_again(broken, "graphs/weights.json")
        case _:
            rewrite(broken, lambda data: data["files"].update({f"recipe.json/{bad}": record}))
    with pytest.raises(EngineError) as caught:
        load(broken)
    assert str(broken) in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert "\x00" not in str(caught.value)


@pytest.mark.parametrize("name", ["graphs/segment_01.onnx", "tokenizer.json", "recipe.json", "graphs/weights.data"])
def test_what_is_loaded_is_listed(name: str, broken: Path, load: Callable[..., Engine]) -> None:
    rewrite(broken, lambda data: data["files"].pop(name))
    with pytest.raises(EngineError) as caught:
        load(broken)
    assert Path(name).name in str(caught.value)
    assert FILE_NAME in str(caught.value) or "no digest of it" in str(caught.value)


def test_a_file_beside_the_graphs_that_is_not_listed_is_refused(broken: Path, load: Callable[..., Engine]) -> None:
    """A graph could name it as the file of its weights."""
    (broken / "graphs" / "more").mkdir()
    (broken / "graphs" / "more" / "weights.data").touch()
    (broken / "notes.txt").write_text("files elsewhere in the folder are the owner's business")
    with pytest.raises(EngineError, match="more is not a file that was built"):
        load(broken)
    shutil.rmtree(broken / "graphs" / "more")
    load(broken)


@pytest.mark.parametrize("where", ["../../outside/weights.data", "{outside}/weights.data", "more.data"], ids=lambda w: w[:9])
def test_weights_of_a_graph_outside_its_folder_are_refused(
    where: str, broken: Path, outside: Path, load: Callable[..., Engine]
) -> None:
    """ONNX Runtime opens the file that the graph names."""
    path = broken / "graphs" / "segment_01.onnx"
    graph = onnx.load(path, load_external_data=False)
    external = [tensor for tensor in graph.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in external:
        for entry in tensor.external_data:
            entry.value = where.format(outside=outside) if entry.key == "location" else entry.value
    assert external
    path.write_bytes(graph.SerializeToString())
    list_again(broken, "graphs/segment_01.onnx")
    with pytest.raises(EngineError, match=r"segment_01\.onnx"):
        load(broken)
    if where == "more.data":
        shutil.copyfile(outside / "weights.data", broken / "graphs" / "more.data")
        with pytest.raises(EngineError, match=r"more\.data is not a file that was built"):
            load(broken)


def all_names(folder: Path) -> Iterator[str]:
    yield from sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_links_out_of_the_folder_are_refused(broken: Path, small_folder: Path, load: Callable[..., Engine]) -> None:
    for name in all_names(small_folder):
        (broken / name).unlink()
        (broken / name).symlink_to(small_folder / name)
        with pytest.raises(EngineError, match="is a link out of its folder") as caught:
            load(broken)
        assert name in str(caught.value)
        (broken / name).unlink()
        shutil.copyfile(small_folder / name, broken / name)
    shutil.rmtree(broken / "graphs")
    (broken / "graphs").symlink_to(small_folder / "graphs")
    with pytest.raises(EngineError, match="is a link out of its folder"):
        load(broken)


def test_a_link_to_an_engine_is_followed(small_folder: Path, tmp_path: Path, load: Callable[..., Engine]) -> None:
    (tmp_path / "link").symlink_to(small_folder)
    load(tmp_path / "link")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop"])
def test_special_files_are_refused_without_being_opened(kind: str, broken: Path, load: Callable[..., Engine]) -> None:
    """Opening a pipe would wait for a writer, reading a device would never end."""
    for name in all_names(broken):
        path, content = broken / name, (broken / name).read_bytes()
        path.unlink()
        match kind:
            case "pipe":
                os.mkfifo(path)
            case "device":
                path.symlink_to("/dev/zero")
            case "folder":
                path.mkdir()
            case "loop":
                path.symlink_to(path)
        with pytest.raises(EngineError) as caught:
            load(broken)
        assert name in str(caught.value)
        path.rmdir() if kind == "folder" else path.unlink()
        path.write_bytes(content)


@pytest.mark.parametrize("name", [FILE_NAME, "recipe.json", "graphs/weights.json", "tokenizer.json"])
def test_a_document_of_any_size_is_not_read(name: str, broken: Path, load: Callable[..., Engine]) -> None:
    """The file has no blocks on the disk; in memory it would take its size several times over."""
    os.truncate(broken / name, (MAX_TOKENIZER_BYTES if name == "tokenizer.json" else MAX_DOCUMENT_BYTES) + 1)
    if name != FILE_NAME:
        rewrite(broken, lambda data: data["files"][name].update(n_bytes=(broken / name).stat().st_size))
    with pytest.raises(TrtKvError) as caught:
        Engine.load(broken, verify=False)
    assert "is too large" in str(caught.value)
    assert name in str(caught.value)


SIZES = ("n_layers", "hidden_size", "n_heads", "n_kv_heads", "head_dim", "intermediate_size", "vocab_size")


@pytest.mark.parametrize("value", [0, -1, 10**9, 10**30, 2**24, 7, 2.0, True, "3", None])
@pytest.mark.parametrize("field", [*SIZES, "max_positions", "page_size"])
def test_sizes_that_are_not_the_graphs_are_refused(field: str, value: Any, broken: Path) -> None:
    def change(data: Document) -> None:
        (data if field == "page_size" else data["config"])[field] = value

    rewrite(broken, change)
    if field == "max_positions" and value in (7, 2**24):  # limits the length of a request only
        Engine.load(broken, verify=False, cache_tokens=200).generate("the old", max_new_tokens=2)
        return
    with pytest.raises(EngineError) as caught:
        Engine.load(broken, verify=False)
    assert str(broken) in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {}},
        {"segments": []},
        {"attention_ports": []},
        {"programs": {"prefill": [], "decode": []}},
        {"op_versions": {}},
        {"policy": {}},
        {"config": []},
        {"created_by": 5},
        {"model_name": ["x"]},
    ],
    ids=str,
)
def test_parts_that_are_missing_are_told(change: Document, broken: Path) -> None:
    rewrite(broken, lambda data: data.update(change))
    with pytest.raises(EngineError, match=re.escape(str(broken / FILE_NAME))):
        Engine.load(broken)


@pytest.mark.parametrize("names", [("inputs", "embedding"), ("outputs", "embedding"), ("outputs", "cat")], ids=str)
def test_segments_that_do_not_fit_together_are_told(names: tuple[str, str], broken: Path) -> None:
    key, name = names

    def change(data: Document) -> None:
        for segment in data["segments"]:
            segment[key] = [value for value in segment[key] if value != name]

    rewrite(broken, change)
    with pytest.raises(EngineError, match=r"segment_\d\d.onnx is not the segment that the manifest describes"):
        Engine.load(broken)


def set_first_port(data: Document, changed: Document) -> None:
    data["attention_ports"][0] = changed


def test_ports_that_no_segment_makes_are_told(broken: Path) -> None:
    for port, name in (("q", "other"), ("q", "cat_1"), ("out", "other")):
        shutil.copyfile(broken / FILE_NAME, broken / "aside")
        changed = {**json.loads((broken / FILE_NAME).read_text())["attention_ports"][0], port: name}
        rewrite(broken, partial(set_first_port, changed=changed))
        with pytest.raises(EngineError, match=r"segment_0\d.onnx is not the segment|not of the model in the manifest"):
            Engine.load(broken)
        (broken / "aside").replace(broken / FILE_NAME)


def test_names_cannot_write_to_the_terminal(broken: Path) -> None:
    rewrite(broken, lambda data: data.update(model_name="\x1b[2Jred\nverified  all", reproduce="\x9b31m"))
    text = describe_engine(broken)
    assert "\\x1b[2Jred\\nverified  all" in text
    assert all(line.isprintable() for line in text.split("\n"))
    rewrite(broken, lambda data: data.update(target="\x1b[2J"))
    with pytest.raises(EngineError) as caught:
        Engine.load(broken)
    assert "\x1b" not in str(caught.value)


def test_an_engine_is_pinned_by_its_digest(small_folder: Path, broken: Path) -> None:
    digest = recorded_digest(small_folder)
    assert f"digest    {digest}" in describe_engine(small_folder, digest=digest)
    Engine.load(small_folder, digest=digest, cache_tokens=200)
    AsyncEngine.load(small_folder, digest=digest, cache_tokens=200)
    rewrite(broken, lambda data: data.update(created_by="somebody else"))
    Engine.load(broken, cache_tokens=200)
    for load in (Engine.load, AsyncEngine.load):
        with pytest.raises(EngineError, match="is another engine than was asked for"):
            load(broken, digest=digest)
    for wrong in ("", digest.removeprefix("sha256:"), digest[:-1], digest.upper()):
        with pytest.raises(UsageError, match="this is not a digest"):
            Engine.load(small_folder, digest=wrong)
    with pytest.raises(UsageError, match="only if its files are verified"):
        Engine.load(small_folder, digest=digest, verify=False)


def test_commands_pin_an_engine(small_folder: Path, broken: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = recorded_digest(small_folder)
    rewrite(broken, lambda data: data.update(created_by="somebody else"))
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text('{"task": "t", "name": "n", "prompt": "the old", "expected": "man"}\n')
    for command in (["inspect"], ["generate", "the old"], ["evaluate", "--tasks", str(tasks)]):
        name, *words = command
        assert main([name, str(small_folder), *words, "--digest", digest]) == 0, capsys.readouterr().err
        assert main([name, str(broken), *words, "--digest", digest]) == 1
        assert "is another engine than was asked for" in capsys.readouterr().err
        assert main([name, str(small_folder), *words, "--digest", "sha256:0"]) == 2


def test_a_name_of_a_file_is_joined_or_refused(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ä file").touch()
    assert safe_join(tmp_path, "in/ä file", error=EngineError) == tmp_path / "in" / "ä file"
    (tmp_path / "in" / "link").symlink_to("ä file")
    safe_join(tmp_path, "in/link", error=EngineError)
    for name in ("in", "in/none", "in/link/more", "x" * 5000, *NAMES):
        with pytest.raises(EngineError):
            safe_join(tmp_path, name, error=EngineError)
