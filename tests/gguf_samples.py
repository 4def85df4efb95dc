"""Models of every family that GGUF files hold, and the metadata that llama.cpp's converter writes about them.

Sizes are pairwise distinct; rows are whole numbers of blocks of 32.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer

from tests.sample_tokenizers import TOKENIZERS

SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "rms_norm_eps": 1e-5,
}
TEMPLATE = "{% for message in messages %}<|user|>{{ message.content }}<|eot|>{% endfor %}"
CONTROL, NORMAL, USER_DEFINED = 3, 1, 4

Metadata = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A model of transformers, and what the converter makes of it. ``architecture``: llama.cpp's name.

    ``fields``: of ``config.json`` beyond ``SIZES``. ``metadata``: the converter's keys for them, without the architecture.
    ``norm_offset``: what the converter adds to norms. ``extra``: tensors that are no weights.
    """

    model_type: str
    architecture: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False
    norm_offset: float = 0.0
    extra: Mapping[str, Sequence[float]] = field(default_factory=dict)


SAMPLES = {
    "llama": Sample(
        model_type="llama",
        architecture="llama",
        fields={"tie_word_embeddings": False, "rope_theta": 5000.0},
        metadata={"rope.freq_base": 5000.0, "rope.dimension_count": 16},
        interleaved=True,
    ),
    "llama-tied-biases": Sample(
        model_type="llama",
        architecture="llama",
        fields={"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        interleaved=True,
    ),
    "mistral": Sample(
        model_type="mistral",
        architecture="llama",
        fields={"sliding_window": None, "head_dim": 32},
        metadata={"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32},
        interleaved=True,
    ),
    "qwen2": Sample(model_type="qwen2", architecture="qwen2", fields={"tie_word_embeddings": True}),
    "qwen3": Sample(
        model_type="qwen3",
        architecture="qwen3",
        fields={"head_dim": 32},
        metadata={"attention.key_length": 32, "attention.value_length": 32},
    ),
    "gemma2": Sample(
        model_type="gemma2",
        architecture="gemma2",
        fields={"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 24, "attn_logit_softcapping": 20.0},
        metadata={
            "attention.key_length": 32,
            "attention.value_length": 32,
            "attention.sliding_window": 24,
            "attn_logit_softcapping": 20.0,
            "final_logit_softcapping": 30.0,
        },
        norm_offset=1.0,
    ),
    "gemma3": Sample(
        model_type="gemma3_text",
        architecture="gemma3",
        fields={
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        metadata={
            "attention.key_length": 32,
            "attention.value_length": 32,
            "attention.sliding_window": 24,
            "rope.freq_base": 1000000.0,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
        },
        norm_offset=1.0,
    ),
    "phi3": Sample(
        model_type="phi3",
        architecture="phi3",
        fields={"sliding_window": 40, "partial_rotary_factor": 0.75, "pad_token_id": 0},
        metadata={"attention.sliding_window": 40, "rope.dimension_count": 12},
    ),
    "phi3-longrope": Sample(
        model_type="phi3",
        architecture="phi3",
        fields={
            "sliding_window": None,
            "pad_token_id": 0,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75],
                "long_factor": [1.0, 1.5, 2.25, 3.0, 4.5, 6.0, 8.25, 9.0],
                "original_max_position_embeddings": 64,
            },
        },
        metadata={
            "attention.sliding_window": 0,
            "rope.dimension_count": 16,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.attn_factor": 1.0801234497346435,
        },
        extra={
            "rope_factors_short.weight": [1.0, 1.05, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75],
            "rope_factors_long.weight": [1.0, 1.5, 2.25, 3.0, 4.5, 6.0, 8.25, 9.0],
        },
    ),
    "smollm3": Sample(
        model_type="smollm3",
        architecture="smollm3",
        fields={"rope_theta": 5000.0, "num_hidden_layers": 5, "pad_token_id": 0},
        metadata={"block_count": 5, "rope.freq_base": 5000.0, "rope.dimension_count": 16},
        interleaved=True,
    ),
    "granite": Sample(
        model_type="granite",
        architecture="granite",
        fields={
            "attention_multiplier": 0.25,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 8.0,
            "tie_word_embeddings": True,
        },
        metadata={
            "attention.scale": 0.25,
            "embedding_scale": 12.0,
            "residual_scale": 0.5,
            "logit_scale": 8.0,
            "rope.dimension_count": 16,
        },
        interleaved=True,
    ),
    "olmo2": Sample(
        model_type="olmo2", architecture="olmo2", fields={"rope_theta": 5000.0}, metadata={"rope.freq_base": 5000.0}
    ),
    "qwen2-yarn": Sample(
        model_type="qwen2",
        architecture="qwen2",
        fields={
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
        metadata={
            "rope.freq_base": 10000.0,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        },
    ),
}


def tokenizer_metadata(tokenizer: Tokenizer) -> Metadata:
    """A byte-level vocabulary as the converter writes it."""
    vocabulary = tokenizer.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.__getitem__)
    special = {token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in special else NORMAL for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges_of(tokenizer)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 4,
        "tokenizer.chat_template": TEMPLATE,
    }


def merges_of(tokenizer: Tokenizer) -> list[list[str]]:
    merges: list[list[str]] = json.loads(tokenizer.to_str())["model"]["merges"]
    return merges


BYTE_LEVEL = tokenizer_metadata(TOKENIZERS["byte-level"])
VOCAB_SIZE = len(BYTE_LEVEL["tokenizer.ggml.tokens"])
