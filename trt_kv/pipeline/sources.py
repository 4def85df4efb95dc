"""The checkpoint that a request names."""

from typing import TYPE_CHECKING

from trt_kv.pipeline.callbacks import OnNote
from trt_kv.pipeline.plans import ModelSource

if TYPE_CHECKING:
    from trt_kv.export.checkpoints.base import Checkpoint


def open_source(source: ModelSource, on_note: OnNote) -> "Checkpoint":
    """The checkpoint of ``source``, checked; downloaded from the hub if it is named by an id.

    Raises ``CheckpointError`` if there is none or its files do not fit together.
    """
    from trt_kv.export.checkpoints.hub import resolve_checkpoint
    from trt_kv.export.checkpoints.opening import open_checkpoint

    location = resolve_checkpoint(source.model, source.checkpoint)
    if source.checkpoint is None:
        on_note(f"no CHECKPOINT given: using the small {source.model} checkpoint that comes with trt-kv")
    return open_checkpoint(location)
