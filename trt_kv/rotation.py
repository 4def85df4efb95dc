"""Rotary position embeddings (Su et al. 2021) in torch: frequencies, and the rotation of queries and keys."""

import math

import torch
from torch import Tensor, nn

from trt_kv.rope_config import RopeConfig

Rotation = tuple[Tensor, Tensor]
"""Cosines and sines of a step's tokens, each ``[N, pairs]``."""


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each channel pair that turns, fp32 radians, always on the CPU; ``[D/2]`` unless a part of each head
    turns (``rotary_dim``).
    """
    rotary_dim = rope.rotary_dim or head_dim
    size = head_dim if rope.kind == "proportional" else rotary_dim
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64, device="cpu").float() / size
    powers = rope.theta**exponents
    frequencies = 1.0 / powers
    # Operations in transformers' order, to the last bit: an angle has their error times its position.
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        return _yarn(rope, frequencies, 1.0 / (rope.factor * powers))
    if rope.kind == "longrope":
        return 1.0 / (torch.tensor(rope.factors, device="cpu") * powers)
    if rope.kind == "proportional":  # the other channels are rotated by nothing, so that pairs are half a head apart
        still = torch.zeros((head_dim - rotary_dim) // 2, device="cpu")
        return torch.cat((frequencies, still)) / rope.factor
    return frequencies / rope.factor if rope.kind == "linear" else frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1 release: wavelengths above ``original / low_freq_factor`` are divided by ``factor``, those below
    ``original / high_freq_factor`` stay, and in between the two are blended linearly in 1 / wavelength.
    """
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_positions / wavelengths
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def _yarn(rope: RopeConfig, frequencies: Tensor, divided: Tensor) -> Tensor:
    """YaRN (Peng et al. 2023, section 3.2): pairs that turn more than ``beta_fast`` times within the original context stay,
    those that turn less than ``beta_slow`` times are ``divided`` by ``factor``, and in between the two are blended linearly
    along the pairs.
    """
    rotary_dim = 2 * len(frequencies)

    def pair_of(turns: float) -> float:
        wavelength = rope.original_max_positions / turns
        return rotary_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    first, last = pair_of(rope.beta_fast), pair_of(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    if first == last:
        last += 0.001  # a step instead of a ramp
    pairs = torch.arange(len(frequencies), dtype=torch.float32, device="cpu")
    kept = 1 - ((pairs - first) / (last - first)).clamp(0.0, 1.0)
    return divided * (1 - kept) + frequencies * kept


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
        self.register_buffer("frequencies", rope_frequencies(rope, head_dim), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        angles = positions.float().unsqueeze(-1) * self.frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._factor != 1.0:
            cos, sin = cos * self._factor, sin * self._factor
        return cos.to(dtype), sin.to(dtype)
