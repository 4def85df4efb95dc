"""By which frequencies a model turns the keys of each layer: the attribute ``frequencies`` of PredictedScores."""

from functools import partial

import numpy as np

from trt_kv.model_config import ModelConfig
from trt_kv.rope_config import RopeConfig
from trt_kv.rope_frequencies import rope_frequencies


def key_frequencies(config: ModelConfig) -> list[tuple[float, ...]]:
    """For each layer, radians per position of each pair of channels; zeros where keys are not turned."""
    whole = _of(config.rope, config.head_dim)
    local = whole if config.local_rope is None else _of(config.local_rope, config.head_dim)
    return [
        (0.0,) * len(whole) if layer in config.unrotated_layers else local if layer in config.local_rope_layers else whole
        for layer in range(config.n_layers)
    ]


def _of(rope: RopeConfig, head_dim: int) -> tuple[float, ...]:
    found = rope_frequencies(rope, head_dim, array=partial(np.array, dtype=np.float32))
    return tuple(np.asarray(found, np.float32).tolist())
