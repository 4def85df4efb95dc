"""Where the format of a checkpoint is decided."""

from pathlib import Path

from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.huggingface import open_huggingface


def open_checkpoint(location: Path) -> Checkpoint:
    """Open and check the checkpoint at ``location``, a folder in Hugging Face layout. Weights are not read, only their headers.

    Raises ``CheckpointError`` naming the first file that does not fit.
    """
    return open_huggingface(location)
