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
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
MODEL_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True, kw_only=True)
class GgufFamily:
    """``norms``: the norms of a layer, by Hugging Face's names. ``interleaved``: the rows of q and k are stored in pairs that
    rotate together, as ggml's normal RoPE needs them; Hugging Face's are in halves. ``settings``: fields of ``config.json``
    that only this family has, from the metadata and the common fields. ``reads``: the keys for them that change results.

    Norms that Hugging Face stores less one (Gemma) are stored whole, as the decoder has them.
    """

    model_type: str
    class_name: str
    norms: Mapping[str, str] = field(default_factory=lambda: PRE_NORMS)
    interleaved: bool = False
    settings: Callable[[ModelFacts, Fields], Fields] = lambda _facts, _fields: {}
    reads: tuple[str, ...] = ()


def _biases(facts: ModelFacts, _fields: Fields) -> Fields:
    return {
        "attention_bias": facts.has_tensor("blk.0.attn_q.bias"),
        "mlp_bias": facts.has_tensor("blk.0.ffn_gate.bias"),
    }


def _llama(facts: ModelFacts, fields: Fields) -> Fields:
    """Mistral has llama.cpp's architecture "llama" too; a window is the only difference."""
    window = facts.integer("attention.sliding_window")
    if not window:
        return _biases(facts, fields)
    return {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": window}


def _qwen(facts: ModelFacts, _fields: Fields) -> Fields:
    """Their configurations name a window that is not used."""
    return {"use_sliding_window": False, "attention_bias": facts.has_tensor("blk.0.attn_q.bias")}


def _gemma(facts: ModelFacts, fields: Fields, *, largest: int) -> Fields:
    """``largest``: layers of the 27B model, whose attention alone is scaled by the width per head. The file does not say so."""
    per_head = fields["hidden_size"] // fields["num_attention_heads"]
    return {
        "query_pre_attn_scalar": per_head if fields["num_hidden_layers"] == largest else fields["head_dim"],
        "sliding_window": facts.integer("attention.sliding_window") or None,
        "attn_logit_softcapping": facts.number("attn_logit_softcapping"),
        "final_logit_softcapping": facts.number("final_logit_softcapping"),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _gemma2(facts: ModelFacts, fields: Fields) -> Fields:
    """The first converters did not write the window."""
    common = _gemma(facts, fields, largest=46)
    return {**common, "sliding_window": common["sliding_window"] or 4096}


def _gemma3(facts: ModelFacts, fields: Fields) -> Fields:
    """Of six layers five have a window, unless the file says of each layer whether it has; none, if it states no window."""
    common = _gemma(facts, fields, largest=62)
    slides = facts.per_layer("attention.sliding_window_pattern")
    if common["sliding_window"] is None:
        slides = [False] * fields["num_hidden_layers"]
    pattern = 6 if slides is not None else facts.integer("attention.sliding_window_pattern")
    types = None if slides is None else ["sliding_attention" if slide else "full_attention" for slide in slides]
    local_theta = facts.number("rope.freq_base_swa")
    return {
        **common,
        "sliding_window_pattern": 6 if pattern is None else pattern,
        "layer_types": types,
        "rope_local_base_freq": 10000.0 if local_theta is None else local_theta,
    }


def _phi3(facts: ModelFacts, fields: Fields) -> Fields:
    original = facts.integer("rope.scaling.original_context_length")
    return {
        "sliding_window": facts.integer("attention.sliding_window") or None,
        "original_max_position_embeddings": fields["max_position_embeddings"] if original is None else original,
    }


def _smollm3(facts: ModelFacts, fields: Fields) -> Fields:
    """llama.cpp leaves RoPE out of every fourth layer, whatever the file says."""
    return {**_biases(facts, fields), "no_rope_layer_interval": 4, "use_sliding_window": False}


def _granite(facts: ModelFacts, fields: Fields) -> Fields:
    return {
        **_biases(facts, fields),
        "attention_multiplier": facts.number("attention.scale") or fields["head_dim"] ** -0.5,
        "embedding_multiplier": facts.number("embedding_scale") or 1.0,
        "residual_multiplier": facts.number("residual_scale") or 1.0,
        "logits_scaling": facts.number("logit_scale") or 1.0,
    }


_WINDOW, _CAPS = "attention.sliding_window", ("attn_logit_softcapping", "final_logit_softcapping")
_MULTIPLIERS = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")

FAMILIES = {
    "llama": GgufFamily(model_type="llama", class_name="LlamaForCausalLM", interleaved=True, settings=_llama, reads=(_WINDOW,)),
    "qwen2": GgufFamily(model_type="qwen2", class_name="Qwen2ForCausalLM", settings=_qwen, reads=(_WINDOW,)),
    "qwen3": GgufFamily(model_type="qwen3", class_name="Qwen3ForCausalLM", settings=_qwen, reads=(_WINDOW,)),
    "gemma2": GgufFamily(
        model_type="gemma2", class_name="Gemma2ForCausalLM", norms=BOTH_NORMS, settings=_gemma2, reads=(_WINDOW, *_CAPS)
    ),
    "gemma3": GgufFamily(
        model_type="gemma3_text", class_name="Gemma3ForCausalLM", norms=BOTH_NORMS, settings=_gemma3, reads=(_WINDOW, *_CAPS)
    ),
    "phi3": GgufFamily(model_type="phi3", class_name="Phi3ForCausalLM", settings=_phi3, reads=(_WINDOW,)),
    "smollm3": GgufFamily(model_type="smollm3", class_name="SmolLM3ForCausalLM", interleaved=True, settings=_smollm3),
    "granite": GgufFamily(
        model_type="granite", class_name="GraniteForCausalLM", interleaved=True, settings=_granite, reads=_MULTIPLIERS
    ),
    "olmo2": GgufFamily(model_type="olmo2", class_name="Olmo2ForCausalLM", norms=POST_NORMS),
}
"""By ``general.architecture``."""
