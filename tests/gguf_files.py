"""Small GGUF files as llama.cpp's converter writes them, made from random models of transformers.

Sizes are pairwise distinct; rows are whole numbers of blocks of 32.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer

from tests.sample_tokenizers import TOKENIZERS

N_LAYERS = 2
SIZES: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": N_LAYERS,
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
    """

    model_type: str
    architecture: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    interleaved: bool = False


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


def sample_model(sample: Sample, *, seed: int = 11) -> transformers.PreTrainedModel:
    """The random model in transformers, in fp32."""
    fields = {**SIZES, "vocab_size": VOCAB_SIZE, **sample.fields}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(sample.model_type, **fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            bias = 0.0 if name.endswith("bias") else 1.0
            parameter.copy_(bias + 0.3 * noise if parameter.dim() == 1 else 2.0 * noise / parameter.shape[-1] ** 0.5)
    assert isinstance(model, transformers.PreTrainedModel)
    model.eval()
    return model


def sample_metadata(sample: Sample) -> Metadata:
    """What the converter writes about the model and its tokenizer."""
    sizes = {
        "block_count": SIZES["num_hidden_layers"],
        "context_length": SIZES["max_position_embeddings"],
        "embedding_length": SIZES["hidden_size"],
        "feed_forward_length": SIZES["intermediate_size"],
        "attention.head_count": SIZES["num_attention_heads"],
        "attention.head_count_kv": SIZES["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": SIZES["rms_norm_eps"],
        **sample.metadata,
    }
    return {"general.name": "a test", **{f"{sample.architecture}.{key}": value for key, value in sizes.items()}, **BYTE_LEVEL}


def converted_weights(sample: Sample, model: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """The model's weights with the converter's names, and its order of the rows of q and k. Tied weights once."""
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[sample.architecture], N_LAYERS)
    weights = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        stored = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        values = tensor.numpy()
        if sample.interleaved and ".q_proj" in name:
            values = interleaved(values, SIZES["num_attention_heads"])
        if sample.interleaved and ".k_proj" in name:
            values = interleaved(values, SIZES["num_key_value_heads"])
        weights[stored] = values
    return weights


def interleaved(values: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows in the order that ggml's normal RoPE needs: of each head the first of its first half, the first of its second ..."""
    half = len(values) // n_heads // 2
    order = [head * 2 * half + part * half + i for head in range(n_heads) for i in range(half) for part in (0, 1)]
    return np.ascontiguousarray(values[order])


def write_gguf(
    path: Path,
    weights: Mapping[str, np.ndarray],
    metadata: Mapping[str, Any],
    *,
    architecture: str = "llama",
    scheme: str = "F32",
    split: Mapping[str, int] | None = None,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Write a GGUF file. Matrices are quantised by ``scheme``, vectors are float32."""
    writer = gguf.GGUFWriter(path, architecture, endianess=endianess)
    for key, value in metadata.items():
        _add(writer, key, value)
    for key, value in (split or {}).items():
        writer.add_uint16(f"split.{key}", value)
    kind = gguf.GGMLQuantizationType[scheme]
    for name, values in weights.items():
        if values.ndim == 1 or scheme == "F32":
            writer.add_tensor(name, values.astype(np.float32))
        else:
            writer.add_tensor(name, gguf.quantize(values.astype(np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case list():
            writer.add_array(key, value)


def write_sample(path: Path, name: str = "llama", *, scheme: str = "F32", changes: Mapping[str, Any] | None = None) -> Path:
    """Write ``SAMPLES[name]``; ``changes`` of the metadata, ``...`` removes a key. ``ARCH`` in a key is the architecture."""
    sample = SAMPLES[name]
    edits = {key.replace("ARCH", sample.architecture): value for key, value in (changes or {}).items()}
    metadata = {key: value for key, value in {**sample_metadata(sample), **edits}.items() if value is not ...}
    weights = converted_weights(sample, sample_model(sample))
    return write_gguf(path, weights, metadata, architecture=sample.architecture, scheme=scheme)
