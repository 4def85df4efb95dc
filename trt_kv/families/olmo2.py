"""OLMo 2 (OLMo team 2025): norms only after attention and MLP, and RMSNorm over whole query and key projections."""

from typing import Any

from trt_kv.family import Family
from trt_kv.hf_fields import Fields


def _norms(_fields: Fields) -> dict[str, Any]:
    return {"norms": "post", "qk_norm_over": "projection"}


FAMILY = Family(
    model_type="olmo2",
    class_name="Olmo2ForCausalLM",
    models="OLMo 2 (1B, 7B, 13B, 32B)",
    defaults={
        "num_key_value_heads": None,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
    },
    qk_norm=True,
    bias_field=True,
    arithmetic=_norms,
)
