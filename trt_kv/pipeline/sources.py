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
    from trt_kv.export.checkpoints.context import in_context
    from trt_kv.export.checkpoints.hub import hub_id_of, resolve_checkpoint
    from trt_kv.export.checkpoints.opening import open_checkpoint

    location = resolve_checkpoint(source.model, source.checkpoint)
    hub_id = None if source.checkpoint is None else hub_id_of(source.checkpoint)
    if source.checkpoint is None and is_bundled(location):
        on_note(f"no CHECKPOINT given: using the small {source.model} checkpoint that comes with trt-kv")
    checkpoint = open_checkpoint(location, revision=None if hub_id is None else hub_id.revision)
    if source.context is not None:
        checkpoint = in_context(checkpoint, source.context)
    _tell_long_or_short(checkpoint, on_note)
    return checkpoint


def _tell_long_or_short(checkpoint: "Checkpoint", on_note: OnNote) -> None:
    """A note about what the context decides, for a RoPE that has factors for short and for long contexts."""
    rope, context = checkpoint.config.rope, checkpoint.config.max_positions
    if rope.kind != "longrope":
        return
    original = rope.original_max_positions
    kind, instead = ("long", f"; --context {original} takes those for short ones") if context > original else ("short", "")
    on_note(
        f"note: {checkpoint.name} has RoPE factors for contexts up to {original} and for longer ones, and an engine has one "
        f"context: with {context} positions it has those for {kind} contexts{instead}"
    )
