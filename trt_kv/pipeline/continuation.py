"""A model continues a prompt with its own likeliest tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trt_kv.runtime.model_runner import ModelRunner


def continue_greedily(runner: "ModelRunner", token_ids: Sequence[int], n_steps: int, end_ids: Sequence[int]) -> None:
    """Run ``token_ids`` and then ``n_steps`` steps of the likeliest token, fewer where one of ``end_ids`` comes first."""
    sequence = runner.new_sequence()
    try:
        logits_V = runner.prefill(sequence, token_ids)
        for _ in range(n_steps):
            token_id = int(logits_V.argmax())
            if token_id in end_ids:
                break
            (logits_V,) = runner.decode([sequence], [token_id])
    finally:
        sequence.release()
