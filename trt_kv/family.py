"""What a family of models is: how its ``config.json`` is read, and where the decoder's weights are in its checkpoints."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trt_kv.hf_fields import Fields
from trt_kv.layer_types import all_full


def nothing_more(_fields: Fields) -> dict[str, Any]:
    """For a family whose arithmetic is Llama's."""
    return {}


def no_layers(_fields: Fields, _n_layers: int) -> tuple[int, ...]:
    """For a family that has RoPE in every layer."""
    return ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """One family of models: a file in ``trt_kv/families``, and what Hugging Face's transformers does with its checkpoints.

    ``model_type`` and ``class_name``: as in ``config.json``. ``other_class_names``: older spellings, and the class without a
    head if that is not named ``...Model``. ``models``: for documentation, well-known models of the family.

    ``defaults``: of fields that ``config.json`` may leave out. ``nullable``: fields whose null means "none", not the default.
    ``derives_head_dim``: without ``head_dim``, heads divide the hidden size. ``bias_field``: ``attention_bias`` switches the
    biases of q, k, v and o; ``mlp_bias_field``: ``mlp_bias`` those of the MLP. ``activation_field``: names the activation.

    ``layer_types``: which layers have windows, one of the functions of ``trt_kv/layer_types.py``. ``arithmetic``: fields ->
    those of ``ModelConfig`` in which the family differs from Llama; ``unrotated``: likewise its layers without RoPE.

    ``partial_rotary``: ``partial_rotary_factor`` is read. ``local_theta``: the default theta of layers with a window, if they
    have a RoPE of their own. ``rope_aliases``: RoPE types by other names.

    ``norm_offset``: added to stored norm weights. ``fused``: q, k, v and gate, up are stored as one tensor each.
    """

    model_type: str
    class_name: str
    other_class_names: tuple[str, ...] = ()
    models: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    nullable: tuple[str, ...] = ("sliding_window", "num_key_value_heads")
    derives_head_dim: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False
    bias_field: bool = False
    mlp_bias_field: bool = False
    activation_field: str = "hidden_act"
    layer_types: Callable[[Fields, int], list[str]] = all_full
    arithmetic: Callable[[Fields], dict[str, Any]] = nothing_more
    partial_rotary: bool = False
    local_theta: float | None = None
    rope_aliases: Mapping[str, str] = field(default_factory=dict)
    unrotated: Callable[[Fields, int], Sequence[int]] = no_layers
    norm_offset: float = 0.0
    fused: bool = False

    @property
    def class_names(self) -> tuple[str, ...]:
        """Every class that ``config.json`` may name."""
        return self.class_name, self.class_name.replace("ForCausalLM", "Model"), *self.other_class_names
