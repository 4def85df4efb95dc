"""Qwen 3, the dense models (Yang et al. 2025): RMSNorm of each query and key head."""

from trt_kv.family import Family
from trt_kv.layer_types import if_used

FAMILY = Family(
    model_type="qwen3",
    class_name="Qwen3ForCausalLM",
    models="Qwen3 (0.6B to 32B), Qwen3 2507 (4B)",
    defaults={"sliding_window": 4096, "max_window_layers": 28},
    derives_head_dim=False,
    qk_norm=True,
    bias_field=True,
    layer_types=if_used,
)
