"""RoPE of a config.json: every spelling, type and setting means what it means in transformers, or is refused."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.configs import LLAMA3_SCALING, read
from trt_kv.errors import CheckpointError
from trt_kv.hf_config import model_config_from_hf
from trt_kv.model_config import ModelConfig, RopeConfig
from trt_kv.rope_frequencies import rope_frequencies

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "spelling",
    [
        {
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", **LLAMA3_SCALING},
            "rope_scaling": ...,
            "rope_theta": ...,
        },
        {"rope_parameters": {"rope_type": "llama3", **LLAMA3_SCALING}, "rope_scaling": ...},
        {"rope_scaling": {"type": "llama3", **LLAMA3_SCALING}},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", **LLAMA3_SCALING}},
    ],
    ids=["new", "new-with-theta-outside", "oldest", "both-alike"],
)
def test_every_spelling_of_rope_means_the_same(spelling: dict[str, Any]) -> None:
    assert read(**spelling).rope == read().rope


def test_two_spellings_of_rope_that_disagree_are_refused() -> None:
    with pytest.raises(CheckpointError, match="two different RoPE settings"):
        read(rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})


def test_dynamic_rope_is_plain_rope_within_the_context() -> None:
    config = transformers.LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0})
    plain = transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    dynamic, default = (LlamaRotaryEmbedding(c) for c in (config, plain))
    x, positions = torch.zeros(1, 1, 1), torch.arange(config.max_position_embeddings)[None]
    for ours, theirs in zip(dynamic(x, positions), default(x, positions), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert read(rope_scaling={"rope_type": "dynamic", "factor": 4.0}).rope == read(rope_scaling=None).rope


@pytest.mark.parametrize("field", ["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"])
def test_a_needed_rope_field_that_is_missing_is_named(field: str) -> None:
    scaling = {name: value for name, value in LLAMA3_SCALING.items() if name != field}
    with pytest.raises(CheckpointError, match=f"rope_scaling in config.json has no field '{field}'"):
        read(rope_scaling={**scaling, "rope_type": "llama3"})


@pytest.mark.parametrize("kind", ["mrope", None, 3])
def test_unknown_rope_types_are_refused_and_the_known_ones_listed(kind: object) -> None:
    with pytest.raises(CheckpointError, match=rf"type {kind!r}\n.*'default', 'linear', 'llama3', 'yarn'"):
        read(rope_scaling={"rope_type": kind, "factor": 4.0})


GEMMA_ROPES = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}


def read_gemma3(**changes: Any) -> ModelConfig:
    return read(model_type="gemma3_text", architectures=None, sliding_window=512, rope_theta=..., **changes)


def test_one_rope_for_each_type_of_layer_is_read_in_both_spellings() -> None:
    old = read_gemma3(rope_scaling={"rope_type": "linear", "factor": 8.0}, rope_local_base_freq=10000)
    assert old == read_gemma3(rope_parameters=GEMMA_ROPES, rope_scaling=...)
    assert old == read_gemma3(rope_parameters=GEMMA_ROPES, rope_scaling={"type": "linear", "factor": 8.0})
    assert (old.rope.factor, old.local_rope) == (8.0, RopeConfig(theta=10000.0))


def test_one_rope_for_each_type_of_layer_is_not_overlooked() -> None:
    """Neither one for all layers, nor one beside them that says something else."""
    with pytest.raises(CheckpointError, match="field 'rope_parameters'"):
        read_gemma3(rope_parameters=GEMMA_ROPES["full_attention"], rope_scaling=...)
    with pytest.raises(CheckpointError, match="two different RoPE settings"):
        read_gemma3(rope_parameters=GEMMA_ROPES, rope_scaling={"rope_type": "linear", "factor": 4.0})


ROPES: dict[str, dict[str, Any]] = {
    "linear": {"factor": 3.0},
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 64},
    "yarn-step": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 2.0,
        "beta_slow": 2.0,
    },
    "yarn-no-original": {"rope_type": "yarn", "factor": 4.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "longrope": {
        "short_factor": [1.0] * 16,
        "long_factor": [2.0 + i for i in range(16)],
        "original_max_position_embeddings": 64,
    },
    "longrope-factor": {"rope_type": "longrope", "short_factor": [1.5] * 16, "long_factor": [2.5] * 16, "factor": 6.0},
    "proportional": {"partial_rotary_factor": 0.25, "factor": 2.0},
}


@pytest.mark.parametrize("theta", [5000.0, 1e6])
@pytest.mark.parametrize("name", ROPES)
def test_frequencies_are_those_of_transformers_to_the_last_bit(name: str, theta: float) -> None:
    settings = {"rope_type": name, "rope_theta": theta, **ROPES[name]}
    theirs = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, head_dim=32, max_position_embeddings=512, rope_parameters=settings
    )
    of_type = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS[settings["rope_type"]]
    inverse, factor = of_type(theirs, torch.device("cpu"), seq_len=512)
    ours = model_config_from_hf({**theirs.to_dict(), "rope_parameters": settings, "architectures": None}, source="config.json")
    torch.testing.assert_close(rope_frequencies(ours.rope, 32, array=torch.tensor), inverse, atol=0, rtol=0)
    in_numpy = rope_frequencies(ours.rope, 32, array=partial(np.array, dtype=np.float32))
    assert in_numpy.dtype == np.float32
    np.testing.assert_allclose(in_numpy, inverse.numpy(), rtol=1e-6)  # powers differ in the last bit
    assert ours.rope.attention_factor == pytest.approx(factor)
