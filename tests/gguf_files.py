"""Small GGUF files as llama.cpp's converter writes them, made from random models of transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from tests.gguf_samples import BYTE_LEVEL, SAMPLES, SIZES, VOCAB_SIZE, Metadata, Sample
from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.gguf_file import open_gguf

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
"""A matrix whose rows some architectures store in another order."""


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
    names = gguf.get_tensor_name_map(kinds[sample.architecture], model.config.num_hidden_layers)
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
        weights[stored] = values + sample.norm_offset if stored.endswith("norm.weight") else values
    return weights | {name: np.array(values, dtype=np.float32) for name, values in sample.extra.items()}


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
    architecture: str | None = "llama",
    scheme: str = "F32",
    split: Mapping[str, int] | None = None,
    endianess: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
) -> Path:
    """Write a GGUF file. Matrices are quantised by ``scheme``, vectors are float32. ``architecture`` None: of ``metadata``."""
    writer = gguf.GGUFWriter(path, architecture or "llama", endianess=endianess)
    if architecture is None:
        writer.kv_data[0].pop("general.architecture")
        metadata = {"general.architecture": "llama", **metadata}
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
        case int() if value < 0:
            writer.add_int32(key, value)
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


def refusal(path: Path) -> CheckpointError:
    """The error that opening ``path`` ends in; it names the file."""
    with pytest.raises(CheckpointError) as caught:
        open_gguf(path)
    assert str(path) in caught.value.what
    return caught.value
