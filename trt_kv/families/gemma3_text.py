"""Gemma 3, text only (Gemma team 2025): five layers of six have a window and their own theta; norms of query and key heads."""

from trt_kv.families.gemma2 import DEFAULTS, NULLABLE, arithmetic
from trt_kv.family import Family
from trt_kv.layer_types import every_nth_full

FAMILY = Family(
    model_type="gemma3_text",
    class_name="Gemma3ForCausalLM",
    other_class_names=("Gemma3TextModel",),
    models="Gemma 3 270M and 1B; the text models of 4B, 12B and 27B, saved without their vision towers",
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
    },
    nullable=NULLABLE,
    bias_field=True,
    qk_norm=True,
    activation_field="hidden_activation",
    layer_types=every_nth_full(6, "sliding_window_pattern"),
    arithmetic=arithmetic,
    local_theta=10000.0,
    norm_offset=1.0,
)
