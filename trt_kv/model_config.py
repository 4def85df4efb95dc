"""The configuration of a decoder-only transformer: one ``ModelConfig`` for every supported architecture.

Read from a Hugging Face ``config.json`` by ``trt_kv.hf_config``; kept in engine manifests as JSON.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trt_kv.errors import CheckpointError, UsageError
from trt_kv.json_file import dataclass_from_json
from trt_kv.rope_config import LARGEST_SIZE, RopeConfig

__all__ = ["LARGEST_SIZE", "ModelConfig", "RopeConfig"]

Activation = Literal["silu", "gelu_tanh"]
Norms = Literal["pre", "pre_and_post", "post"]
QkNorm = Literal["head", "projection"]

_NORM_NAMES: dict[Norms, tuple[str, ...]] = {
    "pre": ("input_layernorm", "post_attention_layernorm"),
    "pre_and_post": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


def windows_within(windows: Sequence[int], context: int) -> tuple[int, ...]:
    """Windows of each layer, in tokens, without those that no query in ``context`` positions notices; empty if none is left."""
    noticed = tuple(window if window < context else 0 for window in windows)
    return noticed if any(noticed) else ()


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that determines a decoder's shapes and arithmetic. Sizes are counts of elements, ``max_positions`` of tokens.

    ``qkv_bias``/``output_bias``: biases of the q, k, v and of the output projection; ``qk_norm``: RMSNorm over each query and
    key head before RoPE (Qwen3). ``tie_embeddings``: the output matrix is the embedding matrix.

    ``windows``: for each layer, how many tokens a query attends to at most, itself included; 0: all before it. Empty: no layer
    has a window. ``attention_scale``: factor on q @ k; 0: ``head_dim ** -0.5``. ``attention_soft_cap``: c of
    ``c * tanh(logit / c)`` on the scaled products; 0: none.

    ``norms``: where a block has RMSNorms: before attention and MLP, before and after each, or only after them (before the
    residual sum). ``qk_norm_over``: each head by itself, or all heads of the projection together. ``activation``: of the gated
    MLP. ``embedding_scale``, ``residual_scale`` and ``logit_scale``: factors on embeddings, on what attention and MLP add, and
    on logits. ``logit_soft_cap``: as ``attention_soft_cap``, on the scaled logits. ``local_rope``: of the layers
    ``local_rope_layers`` instead of ``rope``. ``unrotated_layers``: those without RoPE.
    """

    architecture: str
    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    rms_norm_eps: float
    max_positions: int
    rope: RopeConfig
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    windows: tuple[int, ...] = ()
    attention_scale: float = 0.0
    attention_soft_cap: float = 0.0
    norms: Norms = "pre"
    qk_norm_over: QkNorm = "head"
    activation: Activation = "silu"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    logit_soft_cap: float = 0.0
    local_rope: RopeConfig | None = None
    local_rope_layers: tuple[int, ...] = ()
    unrotated_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if field.type is not int:
                continue
            size = getattr(self, field.name)
            if size < 1:
                raise CheckpointError(f"{field.name} must be at least 1", got=size, expected="an integer >= 1")
            if size > LARGEST_SIZE:
                raise CheckpointError(f"{field.name} is too large", got=size, expected=f"at most {LARGEST_SIZE}")
        if self.n_heads % self.n_kv_heads:
            raise CheckpointError(
                "query heads must divide evenly over KV heads",
                got=f"{self.n_heads} query heads, {self.n_kv_heads} KV heads",
                expected="num_attention_heads a multiple of num_key_value_heads",
            )
        if not self.rms_norm_eps > 0.0:
            raise CheckpointError("rms_norm_eps must be positive", got=self.rms_norm_eps, expected="a number > 0")
        if self.head_dim % 2:
            raise CheckpointError(
                "RoPE needs an even number of channels per head", got=f"head size {self.head_dim}", expected="an even head size"
            )
        self._check_attention()
        self._check_ropes()
        self._check_factors()
        stray = [
            token
            for token in (self.bos_token_id, *self.eos_token_ids)
            if token is not None and not 0 <= token < self.vocab_size
        ]
        if stray:
            raise CheckpointError(
                "a special token is outside the vocabulary", got=stray, expected=f"ids below {self.vocab_size}"
            )

    def _check_attention(self) -> None:
        if self.windows and len(self.windows) != self.n_layers:
            raise CheckpointError(
                "the model has not one attention window per layer",
                got=f"{len(self.windows)} windows, {self.n_layers} layers",
                expected="a window, or 0, for each layer",
            )
        if any(not 0 <= window <= LARGEST_SIZE for window in self.windows):
            raise CheckpointError(
                "an attention window is out of range", got=list(self.windows), expected=f"tokens from 0 to {LARGEST_SIZE}"
            )

    def _check_factors(self) -> None:
        for name in ("attention_scale", "attention_soft_cap", "logit_soft_cap"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise CheckpointError(f"{name} is out of range", got=getattr(self, name), expected="a finite number >= 0")
        for name in ("embedding_scale", "residual_scale", "logit_scale"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise CheckpointError(f"{name} is out of range", got=getattr(self, name), expected="a finite number > 0")

    def _check_ropes(self) -> None:
        for field in ("local_rope_layers", "unrotated_layers"):
            layers = getattr(self, field)
            if list(layers) != sorted(set(layers)) or any(not 0 <= layer < self.n_layers for layer in layers):
                raise CheckpointError(
                    f"{field} are not layers of the model",
                    got=list(layers),
                    expected=f"increasing numbers below {self.n_layers}",
                )
        if (self.local_rope is None) != (not self.local_rope_layers):
            raise CheckpointError(
                "the second RoPE and its layers must both be there",
                got=f"{self.local_rope} for layers {list(self.local_rope_layers)}",
                expected="local_rope if and only if there are local_rope_layers",
            )
        self.rope.check_head(self.head_dim)
        if self.local_rope is not None:
            self.local_rope.check_head(self.head_dim)

    def within(self, context: int) -> "ModelConfig":
        """This model with at most ``context`` positions. A RoPE with factors for short and long contexts then uses those of
        that context, and windows that are no shorter than it are gone. Raises ``UsageError`` unless ``context`` is from 1 to
        ``max_positions``.
        """
        if not 1 <= context <= self.max_positions:
            raise UsageError(
                "the context is out of range",
                got=context,
                expected=f"--context from 1 to {self.max_positions}, the model's own",
            )
        return dataclasses.replace(
            self,
            max_positions=context,
            rope=self.rope.within(context),
            local_rope=None if self.local_rope is None else self.local_rope.within(context),
            windows=windows_within(self.windows, context),
        )

    @property
    def scale(self) -> float:
        """The factor on q @ k."""
        return self.attention_scale or self.head_dim**-0.5

    @property
    def windowed_layers(self) -> tuple[int, ...]:
        """The layers that have a window. They keep it whatever the policy."""
        return tuple(layer for layer, window in enumerate(self.windows) if window)

    @property
    def norm_names(self) -> tuple[str, ...]:
        """The RMSNorms of a block, in order, under Hugging Face's names."""
        return _NORM_NAMES[self.norms]

    @property
    def group_size(self) -> int:
        """Query heads per KV head (G = H / K)."""
        return self.n_heads // self.n_kv_heads

    def check_page_size(self, page_size: int) -> None:
        """``UsageError`` unless a page of the KV cache has at least one token and at most as many as the model's context."""
        if not 1 <= page_size <= self.max_positions:
            raise UsageError(
                "the page size is out of range",
                got=page_size,
                expected=f"--page-size from 1 to {self.max_positions}, the model's positions",
            )

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every weight, under Hugging Face's names; a tied output matrix is not listed."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, self.hidden_size)}
        for layer in range(self.n_layers):
            shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in self._layer_shapes().items()}
        shapes["model.norm.weight"] = (self.hidden_size,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, self.hidden_size)
        return shapes

    def _layer_shapes(self) -> dict[str, tuple[int, ...]]:
        hidden, q_width, kv_width = self.hidden_size, self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        linears = {
            "self_attn.q_proj": (q_width, hidden, self.qkv_bias),
            "self_attn.k_proj": (kv_width, hidden, self.qkv_bias),
            "self_attn.v_proj": (kv_width, hidden, self.qkv_bias),
            "self_attn.o_proj": (hidden, q_width, self.output_bias),
            "mlp.gate_proj": (self.intermediate_size, hidden, self.mlp_bias),
            "mlp.up_proj": (self.intermediate_size, hidden, self.mlp_bias),
            "mlp.down_proj": (hidden, self.intermediate_size, self.mlp_bias),
        }
        shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (hidden,) for name in self.norm_names}
        for name, (n_out, n_in, bias) in linears.items():
            shapes[f"{name}.weight"] = (n_out, n_in)
            if bias:
                shapes[f"{name}.bias"] = (n_out,)
        if self.qk_norm:
            sizes = (self.head_dim, self.head_dim) if self.qk_norm_over == "head" else (q_width, kv_width)
            shapes |= {"self_attn.q_norm.weight": sizes[:1], "self_attn.k_norm.weight": sizes[1:]}
        return shapes

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data; ``from_json`` reads it back to an equal config.

        Fields of ``_ADDED`` that have their default are left out, so that digests of older models stay the same.
        """
        data = {**dataclasses.asdict(self), "eos_token_ids": list(self.eos_token_ids), "rope": self.rope.to_json()}
        if self.local_rope is not None:
            data["local_rope"] = self.local_rope.to_json()
        return {name: value for name, value in data.items() if name not in _ADDED or value != _ADDED[name]}

    @classmethod
    def from_json(cls, data: object) -> "ModelConfig":
        """Read what ``to_json`` wrote. Raises ``CheckpointError`` on a missing, unknown or mistyped field."""
        return dataclass_from_json(cls, data, where="the model config", error=CheckpointError, with_defaults=True)


_ADDED: dict[str, Any] = {
    field.name: field.default
    for field in itertools.dropwhile(lambda field: field.name != "windows", dataclasses.fields(ModelConfig))
}
"""Fields that the first version did not have, which begin with ``windows``, and their defaults."""
