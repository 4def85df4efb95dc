"""The checkpoint that a request names."""

from typing import TYPE_CHECKING

from trt_kv.pipeline.callbacks import OnNote
from trt_kv.pipeline.plans import ModelSource
from trt_kv.presets import is_bundled

if TYPE_CHECKING:
    from trt_kv.export.checkpoints.base import Checkpoint


def open_source(source: ModelSource, on_note: OnNote) -> "Checkpoint":
    """The checkpoint of ``source``, checked; downloaded from the hub if it is named by an id.

    Raises ``CheckpointError`` if there is none or its files do not fit together, ``MissingDependencyError`` if the preset or
    what reads it is not installed.
    """
    from trt_kv.export.checkpoints.hub import hub_id_of, resolve_checkpoint
    from trt_kv.export.checkpoints.opening import open_checkpoint

    location = resolve_checkpoint(source.model, source.checkpoint)
    if source.checkpoint is not None:
        hub_id = hub_id_of(source.checkpoint)
        return open_checkpoint(location, revision=None if hub_id is None else hub_id.revision)
    if is_bundled(location):
        on_note(f"no CHECKPOINT given: using the small {source.model} checkpoint that comes with trt-kv")
    return open_checkpoint(location)
