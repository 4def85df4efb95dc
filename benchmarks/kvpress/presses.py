"""The tokens that a press keeps of a prompt, by kvpress's own code and hooks on transformers.

L layers, H query heads, K KV heads, N tokens of the prompt, S tokens kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class PressRun:
    """Result of a press on one prompt: its scores [L, K, N], and per layer the kept positions, [K, S], in ascending order."""

    scores: Floats
    kept: tuple[Ints, ...]

    @property
    def n_kept(self) -> tuple[int, ...]:
        return tuple(kept_KS.shape[1] for kept_KS in self.kept)


def eager_model(folder: Path) -> transformers.PreTrainedModel:
    """The checkpoint in fp32 with attention weights that presses can read."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32", attn_implementation="eager")
    assert isinstance(model, transformers.PreTrainedModel)
    model.eval()
    return model


def run_press(press: Any, model: transformers.PreTrainedModel, token_ids: Sequence[int]) -> PressRun:
    """Prefill ``token_ids`` under ``press``.

    The press gets positions in place of values. None of the presses compared here reads values, so the gathered values are the
    positions of the kept tokens. kvpress recognises a prefill by ``cache_position``, which transformers no longer passes to
    attention by itself, so it is passed here.
    """
    scores: list[Floats] = []
    kept: list[Ints] = []
    score, compress = press.score, press.compress

    def recorded_score(*args: Any) -> torch.Tensor:
        scores_BKN: torch.Tensor = score(*args)
        scores.append(scores_BKN[0].numpy().copy())
        return scores_BKN

    def compress_positions(
        module: Any, hidden_states: Any, keys: torch.Tensor, values: torch.Tensor, *rest: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        positions = torch.arange(keys.shape[2])[None, None, :, None].expand(values.shape)
        kept_keys, kept_positions = compress(module, hidden_states, keys, positions, *rest)
        kept.append(np.sort(kept_positions[0, :, :, 0].numpy(), axis=1))
        return kept_keys, kept_positions

    press.score, press.compress = recorded_score, compress_positions
    try:
        ids = torch.tensor([list(token_ids)])
        with torch.no_grad(), press(model):
            model(ids, past_key_values=transformers.DynamicCache(), cache_position=torch.arange(ids.shape[1]))
    finally:
        del press.score, press.compress
    return PressRun(scores=np.stack(scores), kept=tuple(kept))
