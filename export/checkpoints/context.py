"""A checkpoint whose engines have a shorter context than its model."""

import dataclasses
from typing import Any, cast

from trt_kv.export.checkpoints.base import Checkpoint


def in_context(checkpoint: Checkpoint, context: int) -> Checkpoint:
    """The same weights with at most ``context`` positions, and the RoPE and windows that the model has in such a context.

    Every class of checkpoints is a dataclass whose field ``config`` alone changes; the digest is that of the new arithmetic.
    Raises ``UsageError`` unless ``context`` is from 1 to the model's own.
    """
    return cast(Checkpoint, dataclasses.replace(cast(Any, checkpoint), config=checkpoint.config.within(context)))
