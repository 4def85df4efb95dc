"""One decoder for every supported architecture; the caller provides attention. It is traced for export and runs on GPUs.

Shapes: N tokens of a step over all sequences, H query heads, K KV heads, D head size, R rows that need logits, V vocabulary.
Submodules have the names that Hugging Face gives them, so that the state dict has the names of a checkpoint's tensors.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from trt_kv.model_config import ModelConfig, RopeConfig

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``attend(layer, q[N,H,D], k[N,K,D], v[N,K,D]) -> [N,H,D]``: cache k and v, attend over the layer's cache.

q and k are rotated (and normed, where the architecture does that) but not scaled: scores are ``q @ k / sqrt(D)``.
"""


def rope_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Angle per position of each channel pair, ``[D/2]`` fp32 radians, always on the CPU.

    ``llama3`` (Llama 3.1 release): wavelengths above ``original / low_freq_factor`` are divided by ``factor``, those below
    ``original / high_freq_factor`` stay, and in between the two are blended linearly in 1 / wavelength.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "default":
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    turns = rope.original_max_positions / wavelengths
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0.0, 1.0)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def rotate(x_NHD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> Tensor:
    """Rotate channel d with channel d + D/2 of every head (the Hugging Face layout); cos and sin are ``[N, D/2]``."""
    low, high = x_NHD.chunk(2, dim=-1)
    cos, sin = cos_ND.unsqueeze(1), sin_ND.unsqueeze(1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis (Zhang and Sennrich 2019, equation 4)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class SelfAttention(nn.Module):
    """Projections, head norms and rotation around the caller's ``attend``."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        q_width, kv_width = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_width, config.hidden_size, bias=config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        q, k, v = (projection(x).unflatten(-1, (-1, self.head_dim)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        attended = attend(self.layer, rotate(q, cos, sin), rotate(k, cos, sin), v)
        output: Tensor = self.o_proj(attended.flatten(-2))
        return output


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


class DecoderLayer(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend)
        output: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return output


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

    frequencies: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("frequencies", rope_frequencies(config.rope, config.head_dim), persistent=False)

    def forward(self, input_ids: Tensor, positions: Tensor, logit_rows: Tensor, attend: Attend) -> Tensor:
        """Logits ``[R, V]`` of the rows ``logit_rows`` of this step's tokens.

        ``input_ids[N]``, ``positions[N]`` (true absolute positions) and ``logit_rows[R]`` are int64. ``attend`` is called once
        per layer, in order.
        """
        x = self.model.embed_tokens(input_ids)
        angles = positions.float().unsqueeze(-1) * self.frequencies
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.model.layers:
            x = layer(x, cos, sin, attend)
        x = self.model.norm(x.index_select(0, logit_rows))
        return functional.linear(x, self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight)
