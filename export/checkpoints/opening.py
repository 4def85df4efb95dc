"""Opens a checkpoint in the class of its format."""

from pathlib import Path

from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.huggingface import open_huggingface


def open_checkpoint(location: Path) -> Checkpoint:
    """Open and check the checkpoint at ``location``, a folder in Hugging Face layout. Weights are not read, only their headers.

    Raises ``CheckpointError`` naming the first inconsistent file.
    """
    return open_huggingface(location)
