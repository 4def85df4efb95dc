"""The config.json of published models: what each says about RoPE, windows and factors is read as transformers reads it."""

import json
from typing import Any

import pytest
import torch
import transformers

from tests.configs import LLAMA3_SCALING
from trt_kv.errors import CheckpointError
from trt_kv.families import family_from_name
from trt_kv.hf_config import model_config_from_hf
from trt_kv.rotation import RotaryEmbedding

pytestmark = pytest.mark.usefixtures("one_thread")


def sizes(
    layers: int, width: int, heads: tuple[int, int], mlp: int, vocabulary: int, positions: int, eps: float = 1e-5
) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "intermediate_size": mlp,
        "vocab_size": vocabulary,
        "max_position_embeddings": positions,
        "rms_norm_eps": eps,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


GELU = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid"}
GEMMA = {**GELU, "attention_bias": False, "query_pre_attn_scalar": 256, "bos_token_id": 2, "pad_token_id": 0}
FACTORS = {"long_factor": [1.0 + 1.3 * i for i in range(48)], "short_factor": [1.0 + 0.04 * i for i in range(48)]}
"""As many as in Phi-3.5 mini and Phi-4 mini, and of that size."""
PHI = {"model_type": "phi3", "bos_token_id": 1, "eos_token_id": 32000, "pad_token_id": 32000, "rope_theta": 10000.0}
PHI |= {"original_max_position_embeddings": 4096, "embd_pdrop": 0.0, "resid_pdrop": 0.0, "tie_word_embeddings": False}
QWEN = {"bos_token_id": 151643, "eos_token_id": 151643, "rope_theta": 1000000.0, "use_sliding_window": False}
MISTRAL = {"model_type": "mistral", "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False}

PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama 3.2 1B": sizes(16, 2048, (32, 8), 8192, 128256, 131072)
    | {"model_type": "llama", "head_dim": 64, "rope_theta": 500000.0, "tie_word_embeddings": True, "bos_token_id": 128000}
    | {"eos_token_id": 128001, "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1}
    | {"rope_scaling": {**LLAMA3_SCALING, "factor": 32.0, "rope_type": "llama3"}},
    "Gemma 2 2B": sizes(26, 2304, (8, 4), 9216, 256000, 8192, 1e-6)
    | {**GEMMA, "model_type": "gemma2", "eos_token_id": 1, "head_dim": 256, "rope_theta": 10000.0, "sliding_window": 4096}
    | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "Gemma 3 1B": sizes(26, 1152, (4, 1), 6912, 262144, 32768, 1e-6)
    | {**GEMMA, "model_type": "gemma3_text", "eos_token_id": [1, 106], "head_dim": 256, "sliding_window": 512}
    | {"rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window_pattern": 6}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    "text of Gemma 3 4B": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240}
    | {"num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
    "Phi-3 mini 4k": sizes(32, 3072, (32, 32), 8192, 32064, 4096) | {**PHI, "rope_scaling": None, "sliding_window": 2047},
    "Phi-3 mini 128k": sizes(32, 3072, (32, 32), 8192, 32064, 131072)
    | {**PHI, "rope_scaling": {**FACTORS, "type": "su"}, "sliding_window": 262144},
    "Phi-3.5 mini": sizes(32, 3072, (32, 32), 8192, 32064, 131072)
    | {**PHI, "rope_scaling": {**FACTORS, "type": "longrope"}, "sliding_window": 262144},
    "Phi-4 mini": sizes(32, 3072, (24, 8), 8192, 200064, 131072)
    | {**PHI, "rope_scaling": {**FACTORS, "type": "longrope"}, "partial_rotary_factor": 0.75, "sliding_window": 262144}
    | {"tie_word_embeddings": True, "bos_token_id": 199999, "eos_token_id": 199999, "full_attn_mod": 1},
    "SmolLM3 3B": sizes(36, 2048, (16, 4), 11008, 128256, 65536, 1e-6)
    | {"model_type": "smollm3", "bos_token_id": None, "eos_token_id": 128012, "no_rope_layers": [1, 1, 1, 0] * 9}
    | {"layer_types": ["full_attention"] * 36, "max_window_layers": 28, "rope_scaling": None, "rope_theta": 5000000.0}
    | {"sliding_window": None, "use_sliding_window": False, "no_rope_layer_interval": 4},
    "Granite 3.3 2B": sizes(40, 2048, (32, 8), 8192, 49159, 131072)
    | {"model_type": "granite", "bos_token_id": 0, "eos_token_id": 0, "rope_scaling": None, "rope_theta": 10000000.0}
    | {"attention_multiplier": 0.015625, "embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.22}
    | {"tie_word_embeddings": True},
    "OLMo 2 1B": sizes(16, 2048, (16, 16), 8192, 100352, 4096, 1e-6)
    | {"model_type": "olmo2", "eos_token_id": 100257, "rope_scaling": None, "rope_theta": 500000, "tie_word_embeddings": False},
    "Qwen2.5 7B": sizes(28, 3584, (28, 4), 18944, 152064, 131072, 1e-6)
    | {**QWEN, "model_type": "qwen2", "max_window_layers": 28, "sliding_window": 131072, "use_mrope": False},
    "Qwen2.5 7B with YaRN": sizes(28, 3584, (28, 4), 18944, 152064, 131072, 1e-6)
    | {**QWEN, "model_type": "qwen2", "max_window_layers": 28, "sliding_window": 131072}
    | {"rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}},
    "Qwen3 4B": sizes(36, 2560, (32, 8), 9728, 151936, 40960, 1e-6)
    | {**QWEN, "model_type": "qwen3", "head_dim": 128, "max_window_layers": 36, "rope_scaling": None, "sliding_window": None},
    "Mistral 7B v0.1": sizes(32, 4096, (32, 8), 14336, 32000, 32768)
    | {**MISTRAL, "rope_theta": 10000.0, "sliding_window": 4096},
    "Mistral 7B v0.3": sizes(32, 4096, (32, 8), 14336, 32768, 32768)
    | {**MISTRAL, "rope_theta": 1000000.0, "sliding_window": None},
    "Mistral Nemo": sizes(40, 5120, (32, 8), 14336, 131072, 131072)
    | {**MISTRAL, "head_dim": 128, "rope_theta": 1000000.0, "sliding_window": None},
}
"""What decides about arithmetic, as published; LongRoPE's factors are others of the same number."""

WINDOWS: dict[str, list[int]] = {
    "Gemma 2 2B": [4096, 0] * 13,
    "Gemma 3 1B": ([512] * 5 + [0]) * 4 + [512] * 2,
    "text of Gemma 3 4B": ([1024] * 5 + [0]) * 5 + [1024] * 4,
    "Phi-3 mini 4k": [2047] * 32,
    "Mistral 7B v0.1": [4096] * 32,
}
"""Of the models that have windows shorter than their context."""


def config_of_transformers(data: dict[str, Any]) -> Any:
    """Made of a copy, since it changes the settings of RoPE; "su" is LongRoPE's first name, which it does not read any more."""
    copy = json.loads(json.dumps(data).replace('"type": "su"', '"type": "longrope"'))
    return transformers.AutoConfig.for_model(**copy)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_as_transformers_reads_it(name: str) -> None:
    data = PUBLISHED[name]
    ours = model_config_from_hf(data, source="config.json")
    theirs = config_of_transformers(data)
    assert list(ours.windows) == WINDOWS.get(name, [])
    assert (ours.n_heads, ours.n_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert (ours.vocab_size, ours.max_positions) == (theirs.vocab_size, theirs.max_position_embeddings)
    assert ours.tie_embeddings == theirs.tie_word_embeddings
    end_ids = theirs.eos_token_id if isinstance(theirs.eos_token_id, list) else [theirs.eos_token_id]
    assert "eos_token_id" not in data or list(ours.eos_token_ids) == end_ids
    rotated = getattr(theirs, "no_rope_layers", [1] * ours.n_layers)
    assert [int(layer not in ours.unrotated_layers) for layer in range(ours.n_layers)] == rotated


@pytest.mark.parametrize("name", PUBLISHED)
def test_rotations_of_a_published_config_are_those_of_transformers_in_its_whole_context(name: str) -> None:
    """cos and sin at positions up to the last one, with LongRoPE's factors for long contexts."""
    data = PUBLISHED[name]
    ours = model_config_from_hf(data, source="config.json")
    theirs = config_of_transformers(data)
    class_name = family_from_name(ours.architecture).class_name.replace("ForCausalLM", "RotaryEmbedding")
    module = __import__(f"transformers.models.{_package(theirs)}.modeling_{_package(theirs)}", fromlist=[class_name])
    rotary = getattr(module, class_name)(theirs)
    positions = torch.tensor([0, 1, 77, 4095, ours.max_positions // 3, ours.max_positions - 1])
    kinds = [("full_attention",), ("sliding_attention",)] if ours.local_rope is not None else [()]
    for kind, rope in zip(kinds, (ours.rope, ours.local_rope), strict=False):
        assert rope is not None
        expected = rotary(torch.zeros(1), positions[None], *kind)
        got = RotaryEmbedding(rope, ours.head_dim)(positions, torch.float32)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(torch.cat((one, one), -1), other[0], atol=0, rtol=0)


def _package(config: Any) -> str:
    return str(config.model_type.removesuffix("_text"))


def test_factors_of_published_configs_are_where_the_decoder_has_them() -> None:
    gemma2, gemma3, granite, olmo2 = (
        model_config_from_hf(PUBLISHED[name], source="config.json")
        for name in ("Gemma 2 2B", "Gemma 3 1B", "Granite 3.3 2B", "OLMo 2 1B")
    )
    assert (gemma2.scale, gemma2.attention_soft_cap, gemma2.logit_soft_cap, gemma2.embedding_scale) == (1 / 16, 50, 30, 48)
    assert (gemma3.scale, gemma3.attention_soft_cap, gemma3.logit_soft_cap) == (1 / 16, 0, 0)
    assert gemma3.embedding_scale == pytest.approx(33.941125)
    assert (granite.scale, granite.embedding_scale, granite.residual_scale, granite.logit_scale) == (1 / 64, 12, 0.22, 1 / 8)
    assert (olmo2.norms, olmo2.qk_norm_over, olmo2.scale) == ("post", "projection", 128**-0.5)


def test_gemma_3_has_no_soft_cap_of_attention_whatever_its_config_says() -> None:
    """transformers reads the field and does not use it."""
    config = model_config_from_hf({**PUBLISHED["Gemma 3 1B"], "attn_logit_softcapping": 50.0}, source="config.json")
    assert config.attention_soft_cap == 0.0


def test_the_whole_config_of_gemma_3_4b_is_refused_for_its_tower() -> None:
    whole = {"model_type": "gemma3", "text_config": PUBLISHED["text of Gemma 3 4B"], "vision_config": {"hidden_size": 1152}}
    with pytest.raises(CheckpointError, match="vision or audio tower"):
        model_config_from_hf(whole, source="config.json")
    without = {name: value for name, value in whole.items() if name != "vision_config"}
    assert model_config_from_hf(without, source="config.json").windows[:6] == (1024, 1024, 1024, 1024, 1024, 0)
