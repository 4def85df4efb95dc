"""A published ``config.json`` to change: that of Llama 3.1 8B."""

from typing import Any

from trt_kv.hf_config import model_config_from_hf
from trt_kv.model_config import ModelConfig

LLAMA3_SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {**LLAMA3_SCALING, "rope_type": "llama3"},
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}


def read(**changes: Any) -> ModelConfig:
    """The Llama 3.1 8B config with ``changes``; ``...`` removes a field."""
    data = {**LLAMA_3_1_8B, **changes}
    return model_config_from_hf({name: value for name, value in data.items() if value is not ...}, source="config.json")


def read_qwen(**changes: Any) -> ModelConfig:
    return read(model_type="qwen2", architectures=["Qwen2ForCausalLM"], rope_scaling=None, **changes)


def read_mistral(**changes: Any) -> ModelConfig:
    return read(model_type="mistral", architectures=["MistralForCausalLM"], rope_scaling=None, **changes)
