"""Rotary position embeddings (Su et al. 2021) in torch: the rotation of queries and keys."""

from functools import partial

import torch
from torch import Tensor, nn

from trt_kv.rope_config import RopeConfig
from trt_kv.rope_frequencies import rope_frequencies

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of a step's tokens, each ``[N, pairs]``."""


def rotate(x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Rotate channel d with channel d + D/2 of every head (the Hugging Face layout); cos and sin are ``[N, D/2]``.

    If they have fewer columns, only the first channels of each head turn, as if the head had no others.
    """
    n_pairs, head_dim = cos_ND.shape[-1], x_NHD.shape[-1]
    cos, sin = cos_ND.unsqueeze(1), sin_ND.unsqueeze(1)
    if 2 * n_pairs == head_dim:
        low, high = x_NHD.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)
    low, high, still = x_NHD.split([n_pairs, n_pairs, head_dim - 2 * n_pairs], dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin, still), dim=-1)


class RotaryEmbedding(nn.Module):
    """The rotations of a step's positions."""

    frequencies: Tensor

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        super().__init__()
        self._factor = rope.attention_factor
        on_cpu = partial(torch.tensor, dtype=torch.float32, device="cpu")
        self.register_buffer("frequencies", rope_frequencies(rope, head_dim, array=on_cpu), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        angles = positions.float().unsqueeze(-1) * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._factor != 1.0:
            cos, sin = cos * self._factor, sin * self._factor
        return cos.to(dtype), sin.to(dtype)
