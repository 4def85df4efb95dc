"""Which layers of a config.json have windows, and which architectures are refused by name."""

from typing import Any

import pytest

from tests.configs import read, read_mistral, read_qwen
from trt_kv.errors import CheckpointError
from trt_kv.families import family_names
from trt_kv.unsupported_models import REFUSALS


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("mixtral", "mixture of experts"),
        ("qwen3_moe", "mixture of experts"),
        ("gpt_oss", "mixture of experts"),
        ("deepseek_v3", "MLA"),
        ("mamba", "recurrent, linear or hybrid"),
        ("qwen3_next", "recurrent, linear or hybrid"),
        ("gemma3", "vision or audio tower"),
        ("qwen2_vl", "vision or audio tower"),
        ("t5", "an encoder"),
    ],
)
def test_other_architectures_are_refused_by_name_with_the_reason(name: str, why: str) -> None:
    with pytest.raises(CheckpointError, match=why) as refusal:
        read(model_type=name, architectures=["SomethingForCausalLM"])
    assert name in str(refusal.value.got)
    assert refusal.value.fix


def test_no_family_is_also_refused_by_name_and_no_name_is_refused_twice() -> None:
    refused = [name for refusal in REFUSALS for name in refusal.model_types]
    assert len(refused) == len(set(refused))
    assert not set(refused) & set(family_names())


@pytest.mark.parametrize(
    ("window", "context", "windows"),
    [(4096, 32768, (4096,) * 32), (..., 32768, (4096,) * 32), (None, 32768, ()), (4096, 4096, ()), (32768, 4096, ())],
)
def test_every_layer_of_mistral_has_its_window_if_that_is_shorter_than_the_context(
    window: object, context: int, windows: tuple[int, ...]
) -> None:
    assert read_mistral(sliding_window=window, max_position_embeddings=context).windows == windows


@pytest.mark.parametrize(
    ("changes", "sliding"),
    [
        ({"use_sliding_window": False}, []),
        ({}, []),
        ({"use_sliding_window": True}, [28, 29, 30, 31]),
        ({"use_sliding_window": True, "max_window_layers": ...}, [28, 29, 30, 31]),
        ({"use_sliding_window": True, "max_window_layers": 32}, []),
        ({"use_sliding_window": True, "sliding_window": None}, []),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 32}, []),
        ({"use_sliding_window": True, "layer_types": ["full_attention"] * 31 + ["sliding_attention"]}, [31]),
    ],
)
def test_the_layers_of_qwen_that_slide_have_windows(changes: dict[str, Any], sliding: list[int]) -> None:
    config = read_qwen(**{"sliding_window": 4096, "max_window_layers": 28, **changes})
    assert list(config.windowed_layers) == sliding
    assert set(config.windows) <= {0, 4096}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"]}, "a type for each of 32 layers"),
        ({"layer_types": ["linear_attention"] * 32}, "layers that trt-kv does not support"),
        ({"sliding_window": 0}, "'sliding_window' in config.json has a bad value"),
    ],
)
def test_impossible_layers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_qwen(use_sliding_window=True, **changes)
