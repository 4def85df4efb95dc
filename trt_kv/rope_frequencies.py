"""Frequencies of rotary position embeddings, in the arrays of whichever library computes the rotation."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from trt_kv.rope_config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int, *, array: Callable[[Sequence[float]], Any]) -> Any:
    """Angle per position of each channel pair that turns, radians; ``[D/2]`` unless a part of each head turns (``rotary_dim``).

    ``array`` makes an fp32 array of numbers, of numpy or torch: the result is computed in that library.
    """
    rotary_dim = rope.rotary_dim or head_dim
    size = head_dim if rope.kind == "proportional" else rotary_dim
    powers = rope.theta ** (array([float(channel) for channel in range(0, rotary_dim, 2)]) / size)
    frequencies = 1.0 / powers
    # Operations in transformers' order, to the last bit: an angle has their error times its position.
    if rope.kind == "llama3":
        return _llama3(rope, frequencies)
    if rope.kind == "yarn":
        pairs = array([float(pair) for pair in range(rotary_dim // 2)])
        return _yarn(rope, frequencies, 1.0 / (rope.factor * powers), pairs)
    if rope.kind == "longrope":
        return 1.0 / (array(rope.factors) * powers)
    if rope.kind == "proportional":  # the other channels are rotated by nothing, so that pairs are half a head apart
        return array([*frequencies.tolist(), *[0.0] * ((head_dim - rotary_dim) // 2)]) / rope.factor
    return frequencies / rope.factor if rope.kind == "linear" else frequencies


def _llama3(rope: RopeConfig, frequencies: Any) -> Any:
    """Llama 3.1 release: wavelengths above ``original / low_freq_factor`` are divided by ``factor``, those below
    ``original / high_freq_factor`` stay, and in between the two are blended linearly in 1 / wavelength.
    """
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_positions / wavelengths
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clip(0.0, 1.0)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def _yarn(rope: RopeConfig, frequencies: Any, divided: Any, pairs: Any) -> Any:
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
    kept = 1 - ((pairs - first) / (last - first)).clip(0.0, 1.0)
    return divided * (1 - kept) + frequencies * kept
