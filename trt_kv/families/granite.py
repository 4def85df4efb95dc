"""Granite 3 (IBM 2024): Llama with factors on embeddings, residuals, attention and logits."""

from typing import Any

from trt_kv.family import Family
from trt_kv.hf_fields import Fields


def _multipliers(fields: Fields) -> dict[str, Any]:
    return {
        "embedding_scale": fields.positive("embedding_multiplier", 1.0),
        "residual_scale": fields.positive("residual_multiplier", 1.0),
        "attention_scale": fields.positive("attention_multiplier", 1.0),
        "logit_scale": 1.0 / fields.positive("logits_scaling", 1.0),
    }


FAMILY = Family(
    model_type="granite",
    class_name="GraniteForCausalLM",
    models="Granite 3.0 to 3.3 (2B, 8B)",
    defaults={
        "num_key_value_heads": None,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
    },
    bias_field=True,
    mlp_bias_field=True,
    arithmetic=_multipliers,
)
