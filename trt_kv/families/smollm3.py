"""SmolLM3 (Hugging Face 2025): every fourth layer has no RoPE (Yang et al. 2025, "RoPE to NoPE and back again")."""

from trt_kv.family import Family
from trt_kv.hf_fields import Fields
from trt_kv.layer_types import FULL, SLIDING, named_types


def _unrotated(fields: Fields, n_layers: int) -> list[int]:
    """``no_rope_layers`` has a 1 for each layer with RoPE; if it is missing, every ``no_rope_layer_interval``-th has none."""
    if fields.data.get("no_rope_layers") is None:
        interval = fields.integer("no_rope_layer_interval")
        if interval < 1:
            raise fields.mistyped("no_rope_layer_interval", "an integer >= 1")
        return [layer for layer in range(n_layers) if (layer + 1) % interval == 0]
    rotated = fields.numbers("no_rope_layers")
    if len(rotated) < n_layers:
        raise fields.mistyped("no_rope_layers", f"0 or 1 for each of {n_layers} layers")
    return [layer for layer in range(n_layers) if not rotated[layer]]


def _layer_types(fields: Fields, n_layers: int) -> list[str]:
    """Only if ``use_sliding_window``: ``layer_types``, or the layers without RoPE."""
    if not fields.flag("use_sliding_window"):
        return [FULL] * n_layers
    unrotated = _unrotated(fields, n_layers)
    return named_types(fields, n_layers) or [SLIDING if layer in unrotated else FULL for layer in range(n_layers)]


FAMILY = Family(
    model_type="smollm3",
    class_name="SmolLM3ForCausalLM",
    models="SmolLM3 3B",
    defaults={
        "num_key_value_heads": 4,
        "rope_theta": 2000000.0,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    bias_field=True,
    mlp_bias_field=True,
    layer_types=_layer_types,
    unrotated=_unrotated,
)
