"""Gemma 3, text only (Gemma team 2025): five layers of six have a window and their own theta; norms of query and key heads."""

from typing import Any

from trt_kv.families import gemma2
from trt_kv.family import Family
from trt_kv.hf_fields import Fields
from trt_kv.layer_types import every_nth_full


def _arithmetic(fields: Fields) -> dict[str, Any]:
    """That of Gemma 2 without a soft cap on attention: transformers reads the field and does not use it."""
    return {**gemma2.arithmetic(fields), "attention_soft_cap": 0.0}


FAMILY = Family(
    model_type="gemma3_text",
    class_name="Gemma3ForCausalLM",
    other_class_names=("Gemma3TextModel",),
    models="Gemma 3 270M and 1B; the text models of 4B, 12B and 27B, saved without their vision towers",
    defaults={
        **gemma2.DEFAULTS,
        # What the config of the text model inside the 4B's leaves out.
        "num_attention_heads": 8,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
    },
    nullable=gemma2.NULLABLE,
    bias_field=True,
    qk_norm=True,
    activation_field="hidden_activation",
    layer_types=every_nth_full(6, "sliding_window_pattern"),
    arithmetic=_arithmetic,
    local_theta=10000.0,
    norm_offset=1.0,
)
