"""A checkpoint may be a folder, a hub id or a preset; what cannot be had is refused with what to pass instead."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.hub_server import COMMIT, serve_hub
from trt_kv.errors import CheckpointError, UnknownNameError, UsageError
from trt_kv.export.checkpoints.hub import resolve_checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
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
    for name, preset in PRESETS.items():
        assert resolve_checkpoint(name, None) == preset.bundled_folder
        assert resolve_checkpoint(name, "") == preset.bundled_folder
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


@pytest.mark.parametrize(
    "argument", ["/nowhere/at/all", "./mine", "../mine", "~/mine", "mine", "models/mine", "a/b/c", "x/y/", "a b/c"]
)
def test_what_looks_like_a_path_never_goes_to_the_hub(argument: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here" / "models").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr("trt_kv.export.checkpoints.hub.require", lambda package: pytest.fail(f"asked for {package}"))
    with pytest.raises(CheckpointError, match="no such folder"):
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
        (403, "", "HfHubHTTPError", "pass a folder"),
    ],
)
def test_a_hub_that_refuses_is_understood(status: int, code: str, got: str, fix: str, tmp_path: Path) -> None:
    with serve_hub({}, refusal=(status, code)) as hub:
        answer = resolve_elsewhere(tmp_path, HF_ENDPOINT=hub.endpoint)
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
