"""Phi-3, Phi-3.5 and Phi-4 (Abdin et al. 2024), text only: fused projections, a part of each head turned, LongRoPE."""

from trt_kv.family import Family
from trt_kv.layer_types import all_sliding

FAMILY = Family(
    model_type="phi3",
    class_name="Phi3ForCausalLM",
    models="Phi-3 mini and medium (4k, 128k), Phi-3.5 mini, Phi-4, Phi-4 mini",
    defaults={
        "num_key_value_heads": None,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    layer_types=all_sliding,
    partial_rotary=True,
    rope_aliases={"su": "longrope", "yarn": "longrope"},  # names of the first Phi-3 releases
    fused=True,
)
