"""Opens a checkpoint in the class of its format."""

from pathlib import Path

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.gguf_file import open_gguf
from trt_kv.export.checkpoints.huggingface import open_huggingface
from trt_kv.export.checkpoints.tensor_matching import some


def open_checkpoint(location: Path, *, revision: str | None = None) -> Checkpoint:
    """Open and check the checkpoint at ``location``: a folder in Hugging Face layout, or a GGUF file.

    Weights are not read, only their headers. ``revision``: of the hub's repository that it comes from, for its name. Raises
    ``CheckpointError`` naming the first inconsistent file.
    """
    if location.is_file():
        return open_gguf(location, revision=revision)
    files = sorted(path.name for path in location.glob("*.gguf")) if location.is_dir() else []
    if files and not (location / "config.json").is_file():
        raise CheckpointError(
            f"{location} holds GGUF files and no config.json",
            got=some(files),
            expected="one checkpoint",
            fix=f"pass the file, e.g. {location / files[0]}",
        )
    return open_huggingface(location, revision=revision)
