"""Qwen 2 and 2.5 (Yang et al. 2024): biases of q, k and v."""

from trt_kv.family import Family
from trt_kv.layer_types import if_used

FAMILY = Family(
    model_type="qwen2",
    class_name="Qwen2ForCausalLM",
    models="Qwen2, Qwen2.5 (0.5B to 72B), Qwen2.5-Coder, QwQ, DeepSeek-R1-Distill-Qwen",
    defaults={"sliding_window": 4096, "max_window_layers": 28},
    qkv_bias=True,
    layer_types=if_used,
)
