"""Gemma 2 (Gemma team 2024): every second layer has a window, soft caps on attention and logits, norms before and after.

Stored norm weights lack 1, embeddings are scaled by the square root of the width.
"""

from typing import Any

from trt_kv.errors import CheckpointError
from trt_kv.family import Family
from trt_kv.hf_fields import Fields
from trt_kv.layer_types import every_nth_full

DEFAULTS = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
NULLABLE = ("sliding_window", "num_key_value_heads", "attn_logit_softcapping", "final_logit_softcapping")


def arithmetic(fields: Fields) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    if fields.flag("use_bidirectional_attention"):
        raise CheckpointError(
            f"{fields.source} has attention in both directions, which trt-kv does not support",
            got="use_bidirectional_attention true",
            expected="a model that generates text: causal attention",
        )
    return {
        "norms": "pre_and_post",
        "attention_scale": fields.positive("query_pre_attn_scalar") ** -0.5,
        "attention_soft_cap": fields.number("attn_logit_softcapping", 0.0),
        "logit_soft_cap": fields.number("final_logit_softcapping", 0.0),
        "embedding_scale": fields.positive("hidden_size") ** 0.5,
    }


FAMILY = Family(
    model_type="gemma2",
    class_name="Gemma2ForCausalLM",
    models="Gemma 2 (2B, 9B, 27B)",
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 8192,
        "rope_theta": 10000.0,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    nullable=NULLABLE,
    bias_field=True,
    activation_field="hidden_activation",
    layer_types=every_nth_full(2),
    arithmetic=arithmetic,
    norm_offset=1.0,
)
