"""Small random checkpoints of every supported architecture, written to disk by transformers itself.

Sizes are pairwise distinct, and weights large enough that logits spread over several units and parity means something.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from trt_kv.presets import PRESETS

VOCAB_SIZE = 269
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""At head size 16 these settings leave one frequency alone, blend one and divide the others."""

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SAMPLES: dict[str, dict[str, Any]] = {
    "llama3-rope": {"model_type": "llama", "head_dim": 16, "rope_parameters": LLAMA3_ROPE},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-untied": {"model_type": "llama", "tie_word_embeddings": False, "rms_norm_eps": 1e-3},
    "llama-biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-linear-rope": {
        "model_type": "llama",
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0},
    },
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-biases": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True, "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
}
"""Name to the fields in which a sample differs from ``_SIZES``."""

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
SHORT_FACTORS, LONG_FACTORS = [1.0, 1.1, 1.3, 1.2, 1.4, 1.7], [1.1, 2.0, 2.5, 3.5, 4.0, 4.5]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": SHORT_FACTORS,
    "long_factor": LONG_FACTORS,
    "partial_rotary_factor": 0.75,
}
FAMILY_SAMPLES: dict[str, dict[str, Any]] = {
    "gemma2": {"model_type": "gemma2", "head_dim": 16, "sliding_window": 11, "query_pre_attn_scalar": 24}
    | {"attn_logit_softcapping": 4.0, "final_logit_softcapping": 9.0, "num_hidden_layers": 4},
    "gemma2-no-caps": {"model_type": "gemma2", "head_dim": 12, "attention_bias": True, "tie_word_embeddings": False}
    | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "sliding_window": 5000},
    "gemma3": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 9, "num_hidden_layers": 7}
    | {"query_pre_attn_scalar": 12, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    "gemma3-no-window": {"model_type": "gemma3_text", "head_dim": 16, "sliding_window": 512}
    | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "phi3": {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 10},
    "phi3-heads": {"model_type": "phi3", "num_attention_heads": 4, "num_key_value_heads": 4},
    "phi4-mini": {"model_type": "phi3", "hidden_size": 64, "num_attention_heads": 4, "tie_word_embeddings": True}
    | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32},
    "phi4-mini-short": {"model_type": "phi3", "hidden_size": 64, "num_attention_heads": 4}
    | {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128},
    "smollm3": {"model_type": "smollm3", "num_hidden_layers": 5},
    "smollm3-windows": {"model_type": "smollm3", "no_rope_layers": [0, 1, 0], "attention_bias": True, "mlp_bias": True}
    | {"use_sliding_window": True, "sliding_window": 10, "tie_word_embeddings": False},
    "granite": {"model_type": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22}
    | {"attention_multiplier": 0.21, "logits_scaling": 0.3, "tie_word_embeddings": True},
    "granite-biases": {"model_type": "granite", "attention_bias": True, "mlp_bias": True, "attention_multiplier": 0.3},
    "olmo2": {"model_type": "olmo2", "num_key_value_heads": 3, "attention_bias": True},
    "mistral-window": {"model_type": "mistral", "head_dim": 16, "sliding_window": 12},
    "qwen2-yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen2-windows": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 13, "max_window_layers": 1},
    "qwen3-windows": {"model_type": "qwen3", "head_dim": 16, "use_sliding_window": True, "sliding_window": 14}
    | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "llama-yarn-mscale": {
        "model_type": "llama",
        "head_dim": 16,
        "rope_parameters": {
            **YARN,
            "mscale": 1.3,
            "mscale_all_dim": 0.4,
            "truncate": False,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
        },
    },
    "llama-yarn-factor": {"model_type": "llama", "rope_parameters": {**YARN, "attention_factor": 0.8}},
    "llama-dynamic": {"model_type": "llama", "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}},
    "llama-proportional": {
        "model_type": "llama",
        "head_dim": 16,
        "rope_parameters": {"rope_type": "proportional", "rope_theta": 500.0, "partial_rotary_factor": 0.5, "factor": 2.0},
    },
}
"""Families and features beyond ``SAMPLES``, in the same form."""


def write_checkpoint(
    folder: Path, sample: str = "llama3-rope", *, shard_size: str = "1GB", dtype: torch.dtype = torch.float32, seed: int = 7
) -> Path:
    """Write a sample with the bundled tokenizer; ``shard_size`` such as "40KB" makes several shards."""
    fields = {**_SIZES, **{**SAMPLES, **FAMILY_SAMPLES}[sample]}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = transformers.AutoModelForCausalLM.from_config(config)
    _randomise(model, seed)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    bundled = PRESETS["llama3"].bundled_folder
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled / name, folder / name)
    return folder


def spell_rope_the_old_way(folder: Path) -> None:
    """Rewrite ``rope_parameters`` in ``config.json`` as ``rope_theta`` beside ``rope_scaling``."""
    config = read_config(folder)
    settings = config.pop("rope_parameters")
    config["rope_theta"] = settings.pop("rope_theta")
    config["rope_scaling"] = None if settings["rope_type"] == "default" else settings
    write_config(folder, config)


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def write_config(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


def edit_config(folder: Path, **changes: Any) -> None:
    """Set fields of ``config.json``; a field set to ``...`` is removed."""
    config = {**read_config(folder), **changes}
    write_config(folder, {name: value for name, value in config.items() if value is not ...})


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    of_norms = 0.0 if "Gemma" in type(model).__name__ else 1.0
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter.copy_((0.0 if name.endswith("bias") else of_norms) + 0.3 * noise)
        else:
            parameter.copy_(2.0 * noise / parameter.shape[-1] ** 0.5)
