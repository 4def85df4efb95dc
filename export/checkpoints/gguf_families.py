"""What GGUF architectures are: the Hugging Face model of each, and how llama.cpp's converter names and orders its weights.

A new family is one entry of ``FAMILIES``, and a function for settings that only it has.
Source of the names: ggml, "gguf-py/gguf/constants.py".
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from trt_kv.export.checkpoints.gguf_metadata import ModelFacts

Fields = dict[str, Any]
"""Fields of ``config.json``."""

PRE_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
POST_NORMS = {"post_attention_layernorm": "post_attention_norm", "post_feedforward_layernorm": "post_ffw_norm"}
BOTH_NORMS = {"input_layernorm": "attn_norm", "pre_feedforward_layernorm": "ffn_norm", **POST_NORMS}

LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MODEL_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
FUSED = {
    "self_attn.q_proj": ("attn_qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "self_attn.k_proj": ("attn_qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "self_attn.v_proj": ("attn_qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    "mlp.gate_proj": ("ffn_up", ("mlp.gate_proj", "mlp.up_proj")),
    "mlp.up_proj": ("ffn_up", ("mlp.gate_proj", "mlp.up_proj")),
}
"""A projection to the matrix that may hold its rows, and to the projections whose rows that matrix holds, in order."""


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """``norms``: the norms of a layer, by Hugging Face's names. ``interleaved``: the rows of q and k are stored in pairs that
    rotate together, as ggml's normal RoPE needs them; Hugging Face's are in halves. ``fused``: q, k and v are one matrix, gate
    and up another. ``settings``: fields of ``config.json`` that only this family has.

    Norms that Hugging Face stores less one (Gemma) are stored whole, as the decoder has them.
    """

    model_type: str
    class_name: str
    norms: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    interleaved: bool = False
    fused: bool = False
    settings: Callable[[ModelFacts], Fields] = lambda _facts: {}


def _llama(facts: ModelFacts) -> Fields:
    """Mistral has llama.cpp's architecture "llama" too; a window is the only difference."""
    window = facts.optional("attention.sliding_window")
    fields = {
        "attention_bias": facts.has_tensor("blk.0.attn_q.bias"),
        "mlp_bias": facts.has_tensor("blk.0.ffn_gate.bias"),
    }
    if not window:
        return fields
    return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}


def _qwen2(_facts: ModelFacts) -> Fields:
    return {"use_sliding_window": False}


def _qwen3(facts: ModelFacts) -> Fields:
    return {"use_sliding_window": False, "attention_bias": facts.has_tensor("blk.0.attn_q.bias")}


FAMILIES = {
    "llama": GgufFamily(model_type="llama", class_name="LlamaForCausalLM", interleaved=True, settings=_llama),
    "qwen2": GgufFamily(model_type="qwen2", class_name="Qwen2ForCausalLM", settings=_qwen2),
    "qwen3": GgufFamily(model_type="qwen3", class_name="Qwen3ForCausalLM", settings=_qwen3),
}
"""By ``general.architecture``."""
