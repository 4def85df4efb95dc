"""Documents of an engine, changed at random: each is refused by an error that names the file, or the engine works."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.engines import build_for_test
from tests.test_drift import drift_of
from tests.test_manifest import changed, leaves_and_branches, signed
from trt_kv.digests import digest_of
from trt_kv.drift import Drift
from trt_kv.errors import RecipeError, TrtKvError, UsageError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.engine import EngineRequest
from trt_kv.manifest import FILE_NAME
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.recipe import RecipeModel
from trt_kv.runtime.engine import Engine

DOCUMENTS = [FILE_NAME, "recipe.json", "graphs/weights.json", "tokenizer.json", "generation_config.json"]
VALUES: list[Any] = [None, True, -1, 0, 1, 3, 2**31, 10**400, 0.5, -2.0, 1e300, float("inf"), float("nan")]
VALUES += ["", "x", "../x", "\x1b[2J", "\ud800", [], {}, [[]], [0], {"": 0}]


@st.composite
def structures(draw: st.DrawFn, document: Any) -> bytes:
    """Some values of the document replaced, removed, doubled, or put in each other's places."""
    data = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(leaves_and_branches(data))
        if not paths:
            break
        path = draw(st.sampled_from(paths))
        match draw(st.sampled_from(["value", "remove", "swap", "double", "key"])):
            case "value":
                data = changed(data, path, draw(st.sampled_from(VALUES)))
            case "remove":
                data = changed(data, path, ...)
            case "swap":
                data = changed(data, path, value_at(data, draw(st.sampled_from(paths))))
            case "double":
                value = value_at(data, path)
                data = changed(data, path, value * 2 if isinstance(value, list | str) else [value, value])
            case "key":
                parent = value_at(data, path[:-1])
                if isinstance(parent, dict):
                    parent[draw(st.sampled_from(["", "x", "../x", "\x00", "\ud800"]))] = parent.pop(path[-1])
    return json.dumps(data).encode()


@st.composite
def flips(draw: st.DrawFn, content: bytes) -> bytes:
    """Some bytes replaced, and perhaps the end cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


def value_at(data: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        data = data[key]
    return copy.deepcopy(data) if path else data


def signed_again(folder: Path, name: str) -> None:
    """Give the changed file the digests that its author would have given it."""
    if name == FILE_NAME:
        data = json.loads((folder / name).read_bytes())
        if isinstance(data, dict):
            (folder / name).write_text(json.dumps(signed(data)))
        return
    data = json.loads((folder / FILE_NAME).read_text())
    data["files"][name] = {"digest": digest_of(folder / name), "n_bytes": (folder / name).stat().st_size}
    (folder / FILE_NAME).write_text(json.dumps(signed(data)))


def check(folder: Path, name: str) -> None:
    """The engine loads and answers, or says what is wrong with which file."""
    try:
        with Engine.load(folder, cache_tokens=400) as engine:
            try:
                assert engine.generate("the old man", max_new_tokens=2).finish_reason in ("length", "stop")
            except UsageError as error:  # a tokenizer that makes nothing of the prompt
                assert name == "tokenizer.json", error  # noqa: PT017
    except TrtKvError as error:
        said = str(error)
        assert str(folder) in said
        assert all(line.isprintable() for line in said.split("\n"))
        assert Path(name).name in said or name == FILE_NAME


def fuzz(folder: Path, name: str, data: st.DataObject) -> None:
    path, manifest = folder / name, folder / FILE_NAME
    content, signature = path.read_bytes(), manifest.read_bytes()
    mutations = st.one_of(structures(json.loads(content)), flips(content))
    try:
        path.write_bytes(data.draw(mutations))
        if data.draw(st.sampled_from([True, True, True, False])):
            try:
                signed_again(folder, name)
            except (ValueError, RecursionError):
                return  # no JSON, so there is nothing to sign
        check(folder, name)
    finally:
        path.write_bytes(content)
        manifest.write_bytes(signature)


FEW = settings(max_examples=40, suppress_health_check=list(HealthCheck), deadline=None)
MANY = settings(max_examples=600, suppress_health_check=list(HealthCheck), deadline=None)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_changed_at_random(name: str, broken: Path) -> None:
    FEW(given(data=st.data())(lambda data: fuzz(broken, name, data)))()


@pytest.mark.slow
@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_document_changed_at_random_often(name: str, broken: Path) -> None:
    MANY(given(data=st.data())(lambda data: fuzz(broken, name, data)))()


@pytest.mark.parametrize("name", [FILE_NAME, "recipe.json"])
def test_documents_of_an_engine_with_budgets_of_kv_heads(name: str, small_lukv_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(small_lukv_folder, tmp_path / "engine")
    FEW(given(data=st.data())(lambda data: fuzz(tmp_path / "engine", name, data)))()


@pytest.mark.parametrize("name", [FILE_NAME, "recipe.json"])
def test_documents_of_an_engine_with_predicted_scores(name: str, small_kvzap_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(small_kvzap_folder, tmp_path / "engine")
    FEW(given(data=st.data())(lambda data: fuzz(tmp_path / "engine", name, data)))()


def own_drift(checkpoint: Checkpoint, policy: Policy) -> Drift:
    """Thresholds for the checkpoint and the policy."""
    model = RecipeModel(name="small", digest=checkpoint.digest, n_layers=checkpoint.config.n_layers)
    return dataclasses.replace(drift_of(checkpoint.config.n_layers, exempt=policy.exempt_layers), model=model)


def test_a_file_of_thresholds_changed_at_random(small_checkpoint_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "drift.json"
    own_drift(open_checkpoint(small_checkpoint_folder), policy_from_name("freekv")).save(path)
    content = path.read_bytes()

    def load(data: st.DataObject) -> None:
        path.write_bytes(data.draw(st.one_of(structures(json.loads(content)), flips(content))))
        try:
            json.dumps(Drift.load(path).to_json(), allow_nan=False)
        except RecipeError as error:
            assert str(path) in str(error)  # noqa: PT017

    FEW(given(data=st.data())(load))()


@pytest.mark.slow
def test_thresholds_of_an_engine_changed_at_random(small_checkpoint_folder: Path, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(small_checkpoint_folder)
    policy = dataclasses.replace(policy_from_name("freekv"), drift="calibrated")
    drift = own_drift(checkpoint, policy)
    engine = build_for_test(EngineRequest(checkpoint=checkpoint, policy=policy, drift=drift, page_size=5), tmp_path / "engine")
    MANY(given(data=st.data())(lambda data: fuzz(engine, "drift.json", data)))()
