"""One decoder for every supported architecture; the caller provides attention. It is traced for export and runs on GPUs.

Shapes: N tokens of a step over all sequences, H query heads, K KV heads, D head size, R rows that need logits, V vocabulary.
Submodules have the names that Hugging Face gives them, so that the state dict has the names of a checkpoint's tensors.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from trt_kv.model_config import ModelConfig
from trt_kv.rotation import RotaryEmbedding, Rotation, rotate

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer, q[N,H,D], k[N,K,D], v[N,K,D]) -> [N,H,D]``: cache k and v, attend over the layer's cache.

q and k are rotated (and normed, where the architecture does that) but not scaled: scores are ``config.scale * q @ k``, soft
capped and within the layer's window, if the config has those.
"""


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Projections, norms of queries and keys, and rotation around the caller's ``attend``."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=config.output_bias)
        self.norms_heads = config.qk_norm_over == "head"
        sizes = (config.head_dim, config.head_dim) if self.norms_heads else (q_width, kv_width)
        self.q_norm = RMSNorm(sizes[0], config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(sizes[1], config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        q, k = self.heads(self.q_proj(x), self.q_norm), self.heads(self.k_proj(x), self.k_norm)
        v = self.heads(self.v_proj(x), None)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        output: Tensor = self.o_proj(attend(self.layer, q, k, v).flatten(-2))
        return output

    def heads(self, projected: Tensor, norm: RMSNorm | None) -> Tensor:
        """``[N, H * D]`` as normed heads ``[N, H, D]``."""
        if norm is not None and not self.norms_heads:
            projected = norm(projected)
        heads = projected.unflatten(-1, (-1, self.head_dim))
        normed: Tensor = norm(heads) if norm is not None and self.norms_heads else heads
        return normed


class MLP(nn.Module):
    """Gated feed-forward (Shazeer 2020): SwiGLU, or GEGLU with the tanh approximation of GELU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.activation = config.activation

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(x)
        gate = functional.silu(gate) if self.activation == "silu" else functional.gelu(gate, approximate="tanh")
        output: Tensor = self.down_proj(gate * self.up_proj(x))
        return output


class DecoderLayer(nn.Module):
    """One transformer block. Its norms have Hugging Face's names, which depend on where the norms are."""

    input_layernorm: RMSNorm
    post_attention_layernorm: RMSNorm
    pre_feedforward_layernorm: RMSNorm
    post_feedforward_layernorm: RMSNorm

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        for name in config.norm_names:
            setattr(self, name, RMSNorm(config.hidden_size, config.rms_norm_eps))
        self.norms = config.norms
        self.residual_scale = config.residual_scale
        self.self_attn = SelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotation: Rotation | None, attend: Attend) -> Tensor:
        if self.norms == "pre":
            x = x + self._scaled(self.self_attn(self.input_layernorm(x), rotation, attend))
            return x + self._scaled(self.mlp(self.post_attention_layernorm(x)))
        before = self.norms == "pre_and_post"
        attended = self.self_attn(self.input_layernorm(x) if before else x, rotation, attend)
        x = x + self._scaled(self.post_attention_layernorm(attended))
        output = self.mlp(self.pre_feedforward_layernorm(x) if before else x)
        return x + self._scaled(self.post_feedforward_layernorm(output))

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.residual_scale == 1.0 else x * self.residual_scale


class Backbone(nn.Module):
    """Everything under ``model.`` in a checkpoint: embedding, blocks, final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A token-flat decoder: the tokens of all sequences of a step are concatenated along N.

    Weights are uninitialised; under ``torch.device("meta")`` none are allocated. The state dict has exactly the names and
    shapes of ``config.tensor_shapes()``.
    """

    embedding_scale: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim)
        self.local_rotary = None if config.local_rope is None else RotaryEmbedding(config.local_rope, config.head_dim)
        self.register_buffer("embedding_scale", torch.tensor(config.embedding_scale, device="cpu"), persistent=False)

    def forward(self, input_ids: Tensor, positions: Tensor, logit_rows: Tensor, attend: Attend) -> Tensor:
        """Logits ``[R, V]`` of the rows ``logit_rows`` of this step's tokens.

        ``input_ids[N]``, ``positions[N]`` (true absolute positions) and ``logit_rows[R]`` are int64. ``attend`` is called once
        per layer, in order.
        """
        config = self.config
        x = self.model.embed_tokens(input_ids)
        if config.embedding_scale != 1.0:
            x = x * self.embedding_scale.to(x.dtype)  # rounded to the compute type, as transformers does for Gemma
        rotation = self.rotary(positions, x.dtype)
        local = rotation if self.local_rotary is None else self.local_rotary(positions, x.dtype)
        for layer, block in enumerate(self.model.layers):
            own = local if layer in config.local_rope_layers else rotation
            x = block(x, None if layer in config.unrotated_layers else own, attend)
        x = self.model.norm(x.index_select(0, logit_rows))
        logits = functional.linear(x, self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)
        if config.logit_scale != 1.0:
            logits = logits * config.logit_scale
        if config.logit_soft_cap:
            logits = config.logit_soft_cap * torch.tanh(logits / config.logit_soft_cap)
        return logits
