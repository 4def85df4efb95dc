"""Llama 1 to 3.x (Touvron et al. 2023, Grattafiori et al. 2024), and the many models with its architecture."""

from trt_kv.family import Family

FAMILY = Family(
    model_type="llama",
    class_name="LlamaForCausalLM",
    other_class_names=("LLaMAForCausalLM",),
    models="Llama 2, Llama 3, 3.1, 3.2 (1B, 3B), 3.3; SmolLM2; TinyLlama; DeepSeek-R1-Distill-Llama; Yi",
    # What the first Llama's config.json did not have.
    defaults={"num_key_value_heads": None, "rope_theta": 10000.0, "max_position_embeddings": 2048},
    bias_field=True,
    mlp_bias_field=True,
)
