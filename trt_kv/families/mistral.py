"""Mistral (Jiang et al. 2023): the first 7B has a window of 4096 tokens in every layer; later ones have none."""

from trt_kv.family import Family
from trt_kv.layer_types import all_sliding

FAMILY = Family(
    model_type="mistral",
    class_name="MistralForCausalLM",
    models="Mistral 7B v0.1 to v0.3, Mistral Nemo, Mistral Small (text), Zephyr",
    defaults={"sliding_window": 4096},
    layer_types=all_sliding,
)
