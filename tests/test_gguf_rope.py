"""RoPE settings of GGUF files, in metadata and in tensors."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.gguf_files import (
    converted_weights,
    refusal,
    sample_metadata,
    sample_model,
    write_gguf,
    write_sample,
)
from tests.gguf_samples import SAMPLES
from trt_kv.export.checkpoints.gguf_file import open_gguf
from trt_kv.export.checkpoints.gguf_rope import llama3_settings


def llama3_divisors(*, factor: float, positions: int, size: int = 16, theta: float = 10000.0) -> NDArray[np.float32]:
    """The divisors of each frequency as the converter computes them (transformers' ``_compute_llama3_parameters``)."""
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        head_dim=size, rope_parameters={**rope, "original_max_position_embeddings": positions}, max_position_embeddings=10**6
    )
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / scaled.double()).to(torch.float32).numpy()


@given(
    factor=st.sampled_from([2.0, 4.0, 8.0, 32.0]),
    positions=st.integers(32, 16_000),
    size_and_theta=st.sampled_from([(16, 10000.0), (64, 500000.0), (128, 500000.0)]),
)
def test_llama3_rope_is_found_from_its_stored_divisors(
    factor: float, positions: int, size_and_theta: tuple[int, float]
) -> None:
    """The settings found give the same divisors; where a frequency is blended, also the same original context."""
    size, theta = size_and_theta
    stored = llama3_divisors(factor=factor, positions=positions, size=size, theta=theta)
    found = llama3_settings(stored, size=size, theta=theta)
    assert found is not None
    again = llama3_divisors(factor=found["factor"], positions=found["original_max_position_embeddings"], size=size, theta=theta)
    np.testing.assert_allclose(again, stored, rtol=2e-4)


def test_rope_divisors_become_the_settings_of_llama3(tmp_path: Path) -> None:
    sample = SAMPLES["llama"]
    weights = converted_weights(sample, sample_model(sample))
    metadata = {**sample_metadata(sample), "llama.rope.freq_base": 10000.0}
    weights["rope_freqs.weight"] = llama3_divisors(factor=4.0, positions=32)
    rope = open_gguf(write_gguf(tmp_path / "a.gguf", weights, metadata)).config.rope
    assert (rope.kind, rope.factor, rope.low_freq_factor, rope.high_freq_factor) == ("llama3", 4.0, 1.0, 4.0)
    assert rope.original_max_positions == 32
    weights["rope_freqs.weight"] = np.linspace(1, 3, 8, dtype=np.float32)
    assert "rope_freqs.weight" in str(refusal(write_gguf(tmp_path / "b.gguf", weights, metadata)).got)


def test_one_of_the_factors_of_longrope_is_not_enough(tmp_path: Path) -> None:
    sample = SAMPLES["phi3-longrope"]
    weights = converted_weights(sample, sample_model(sample))
    weights.pop("rope_factors_short.weight")
    path = write_gguf(tmp_path / "a.gguf", weights, sample_metadata(sample), architecture="phi3")
    assert "rope_factors_short.weight" in str(refusal(path).got)


@pytest.mark.parametrize(("changes", "words"), [({"attn_factor": 1.2}, "attn_factor 1.2"), ({"yarn_attn_factor": 0.5}, "0.5")])
def test_yarn_with_a_factor_of_two_meanings_is_refused(changes: dict[str, float], words: str, tmp_path: Path) -> None:
    more = {f"ARCH.rope.scaling.{key}": value for key, value in changes.items()}
    path = write_sample(tmp_path / "a.gguf", "qwen2-yarn", changes=more)
    assert words in str(refusal(path).got)
    plain = write_sample(tmp_path / "b.gguf", "qwen2-yarn", changes={"ARCH.rope.scaling.yarn_beta_fast": 16.0})
    assert open_gguf(plain).config.rope.beta_fast == 16.0
