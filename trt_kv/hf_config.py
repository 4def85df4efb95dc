"""Hugging Face ``config.json`` to ``ModelConfig``: a family's defaults, required fields, unsupported features."""

from collections.abc import Mapping
from typing import Any

from trt_kv.errors import CheckpointError
from trt_kv.families import family_from_name, family_names
from trt_kv.family import Family
from trt_kv.hf_fields import Fields
from trt_kv.hf_rope import ropes_from_hf
from trt_kv.layer_types import SLIDING, windows_of
from trt_kv.model_config import LARGEST_SIZE, Activation, ModelConfig, RopeConfig, windows_within
from trt_kv.unsupported_models import refuse_unsupported

_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


def model_config_from_hf(data: Mapping[str, Any], *, source: str) -> ModelConfig:
    """Read the parsed ``config.json``; ``source`` names the file in error messages.

    Raises ``CheckpointError`` for a missing or mistyped field, and an architecture, activation or RoPE type that is not
    supported. Quantisation is not looked at.
    """
    data = _text_model(data)
    family = _family(data, source)
    fields = _with_defaults(data, family, source)
    n_layers, n_heads = fields.integer("num_hidden_layers"), fields.integer("num_attention_heads")
    if n_layers > LARGEST_SIZE:  # before anything is made for each layer
        raise fields.mistyped("num_hidden_layers", f"at most {LARGEST_SIZE}")
    hidden_size, max_positions = fields.integer("hidden_size"), fields.integer("max_position_embeddings")
    head_dim = fields.integer("head_dim", _derived_head_dim(hidden_size, n_heads) if family.derives_head_dim else None)
    types = family.layer_types(fields, n_layers)
    rope, local_rope = ropes_from_hf(fields, family, head_dim=head_dim, max_positions=max_positions)
    bias = family.bias_field and fields.flag("attention_bias")
    return ModelConfig(
        architecture=family.model_type,
        n_layers=n_layers,
        hidden_size=hidden_size,
        n_heads=n_heads,
        n_kv_heads=fields.integer("num_key_value_heads", n_heads if "num_key_value_heads" in fields.data else None),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size"),
        vocab_size=fields.integer("vocab_size"),
        rms_norm_eps=fields.number("rms_norm_eps"),
        max_positions=max_positions,
        rope=rope,
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=family.qkv_bias or bias,
        output_bias=bias,
        mlp_bias=family.mlp_bias_field and fields.flag("mlp_bias"),
        qk_norm=family.qk_norm,
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=fields.token_ids("eos_token_id"),
        windows=windows_within(windows_of(fields, types), max_positions),
        activation=_activation(fields, family),
        **_local_rope(local_rope, types),
        unrotated_layers=tuple(family.unrotated(fields, n_layers)),
        **family.arithmetic(fields),
    )


def token_ids_from_hf(data: Mapping[str, Any], name: str, *, source: str) -> tuple[int, ...]:
    """The token ids of field ``name`` (an id, a list or absent), as ``generation_config.json`` has them."""
    return Fields(data, source).token_ids(name)


def _text_model(data: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of the text model inside that of Gemma 3's wrapper, if it has no vision tower; else ``data`` itself."""
    text = data.get("text_config")
    if data.get("model_type") != "gemma3" or data.get("vision_config") or not isinstance(text, Mapping):
        return data
    outer = {name: data[name] for name in ("bos_token_id", "eos_token_id", "quantization_config") if data.get(name) is not None}
    return {**text, **outer, "model_type": "gemma3_text", "architectures": None}


def _family(data: Mapping[str, Any], source: str) -> Family:
    name, class_names = data.get("model_type"), data.get("architectures") or []
    if isinstance(name, str) and name in family_names():
        family = family_from_name(name)
        if class_names == [] or class_names in [[known] for known in family.class_names]:
            return family
    refuse_unsupported(data, source)
    families = [family_from_name(known) for known in family_names()]
    raise CheckpointError(
        f"{source} has an architecture that trt-kv does not support",
        got=f"model_type {name!r}, architectures {class_names}",
        expected="model_type " + ", ".join(f"{known.model_type!r} ({known.class_name})" for known in families),
    )


def _with_defaults(data: Mapping[str, Any], family: Family, source: str) -> Fields:
    given = {name: value for name, value in data.items() if value is not None or name in family.nullable}
    return Fields({**family.defaults, **given}, source)


def _derived_head_dim(hidden_size: int, n_heads: int) -> int | None:
    return None if n_heads < 1 or hidden_size % n_heads else hidden_size // n_heads


def _local_rope(rope: RopeConfig | None, types: list[str]) -> dict[str, Any]:
    """The second RoPE and its layers, if there are any."""
    layers = tuple(layer for layer, kind in enumerate(types) if kind == SLIDING)
    return {"local_rope": rope, "local_rope_layers": layers} if rope is not None and layers else {}


def _activation(fields: Fields, family: Family) -> Activation:
    name = fields.data.get(family.activation_field, "silu")
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise CheckpointError(
            f"{fields.source} has an unsupported activation",
            got=repr(name),
            expected=f"{family.activation_field} " + ", ".join(map(repr, _ACTIVATIONS)),
        )
    return _ACTIVATIONS[name]
