"""A model of Llama 3.1 8B's shape with random weights, and queries with controlled drift.

S steps, L layers, B sequences, H query heads, K KV heads, G = H / K, D head size, P page size.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.device import device
from trt_kv.plugins.attention_triton import attend_one
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.program import Program, program_of

DTYPE = "float16"
STEADY, TURNED = 0.995, 0.95
"""Cosine of a query's content with that of the previous query, for KV heads that are not corrected and for corrected ones.
With random keys about 10 % and 30 % of the chosen pages then differ. Of 32 pages that a KV head of R1-Llama-8B chose, 3.6
changed in a step, and 8.2 if it was corrected (linear fit to third-party measurements with FreeKV's code)."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model (Llama 3.1 8B's by default), of pages and budget, and of the measurement.

    ``host_pages``: of the pinned tier, 4 GiB by default, a power of 2 so that the allocator does not round it up.
    """

    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int = 8
    head_size: int = 128
    hidden: int = 4096
    intermediate: int = 14336
    vocabulary: int = 128256
    page_size: int = 32
    budget_tokens: int = 2048
    sinks: int = 128
    recent: int = 128
    host_pages: int = 2**15
    most_sequences: int = 8
    most_tokens: int = 131072
    rounds: int = 8

    @property
    def policy(self) -> Policy:
        return dataclasses.replace(policy_from_name("freekv"), tokens=self.budget_tokens, sinks=self.sinks, recent=self.recent)

    def program(self, tau: float | None = None) -> Program:
        """The policy; every layer recalls. ``tau``: replaces the policy's threshold; above 1 nothing is recalled ahead."""
        policy = self.policy if tau is None else dataclasses.replace(self.policy, tau=tau)
        return program_of(policy, phase="decode", n_layers=self.n_layers, scale=self.head_size**-0.5, page_size=self.page_size)

    @property
    def token_bytes(self) -> int:
        """Bytes of the keys and values of a token in all layers."""
        return self.n_layers * 4 * self.n_kv_heads * self.head_size

    @property
    def page_head_bytes(self) -> int:
        return 4 * self.page_size * self.head_size


class Dense:
    """A decode step without its attention: norms, the four matrix products of every layer, the output projection.

    Weights are distinct in every layer. There is no embedding and no RoPE.
    """

    def __init__(self, shape: Shape) -> None:
        heads = shape.n_heads * shape.head_size
        sizes = (
            (heads + 2 * shape.n_kv_heads * shape.head_size, shape.hidden),
            (shape.hidden, heads),
            (2 * shape.intermediate, shape.hidden),
            (shape.hidden, shape.intermediate),
        )
        torch.manual_seed(0)
        self._layers = [[_weights(*size) for size in sizes] for _ in range(shape.n_layers)]
        self._vocabulary = _weights(shape.vocabulary, shape.hidden)

    @property
    def n_bytes(self) -> int:
        return self._vocabulary.nbytes + sum(weights.nbytes for layer in self._layers for weights in layer)

    def step(self, x_BX: Tensor, attend: Callable[[int], Tensor]) -> Tensor:
        """Logits of one token of every sequence. ``attend``: a layer's attention [B, H, D]."""
        size = (x_BX.shape[1],)
        for layer, (qkv, out, gate_up, down) in enumerate(self._layers):
            F.linear(F.rms_norm(x_BX, size), qkv)
            x_BX = x_BX + F.linear(attend(layer).flatten(1), out)
            gate, up = F.linear(F.rms_norm(x_BX, size), gate_up).chunk(2, dim=1)
            x_BX = x_BX + F.linear(F.silu(gate) * up, down)
        return F.linear(F.rms_norm(x_BX, size), self._vocabulary)


def _weights(n_out: int, n_in: int) -> Tensor:
    return torch.empty(n_out, n_in, dtype=getattr(torch, DTYPE), device=device()).normal_(std=n_in**-0.5)


class WholeCache:
    """Steps with the whole cache on the device. All layers read the same keys and values, which exceed the GPU's L2 cache."""

    def __init__(self, shape: Shape, dense: Dense, n_tokens: int, batch: int) -> None:
        on, dtype = device(), getattr(torch, DTYPE)
        n_pages = -(-n_tokens // shape.page_size)
        self._scale, self._dense = shape.head_size**-0.5, dense
        self._kv = torch.empty(
            batch * n_pages, 2, shape.n_kv_heads, shape.page_size, shape.head_size, dtype=dtype, device=on
        ).normal_()
        table_BT = torch.randperm(batch * n_pages, device=on).view(batch, n_pages)
        self._table_BKT = table_BT[:, None].expand(-1, shape.n_kv_heads, -1)
        self._cu_tokens = torch.arange(batch + 1, device=on)
        self._kv_len_B = torch.full((batch,), n_tokens, device=on)
        self._q = torch.randn(batch, shape.n_heads, shape.head_size, device=on).to(dtype)
        self._x = torch.randn(batch, shape.hidden, device=on).to(dtype)

    def step(self) -> Tensor:
        return self._dense.step(self._x, self._attend)

    def step_without_attention(self) -> Tensor:
        return self._dense.step(self._x, lambda _layer: self._q)

    def _attend(self, _layer: int) -> Tensor:
        out, lse = torch.empty_like(self._q), torch.empty(self._q.shape[:2], device=self._q.device)
        attend_one(self._q, self._cu_tokens, self._table_BKT, self._kv_len_B, self._kv, self._scale, out, lse)
        return out


@dataclass(frozen=True, kw_only=True)
class Corrections:
    """In every step this share of all layers of all sequences is corrected, each in this share of its KV heads: the same number
    in every step, at random.
    """

    layer_steps: float
    heads: float


def drifting_queries(shape: Shape, batch: int, n_steps: int, corrections: Corrections) -> tuple[Tensor, Tensor]:
    """Queries [S, L, B, H, D] in fp32, and the KV heads to be corrected, [S, L, B, K] bool; all of them in the first step.

    The first half of the channels decides whether a head is corrected: they are all 1 or all -1, and change their sign for a
    correction, which makes the cosine about 0. All keys are 1 in these channels, so they do not affect the ranking of pages.
    The other half, the content, decides which pages are chosen, and drifts by ``STEADY`` or ``TURNED``.
    """
    on, n_groups = device(), shape.n_heads // shape.n_kv_heads
    seed = int(1000 * corrections.layer_steps) + int(1e6 * corrections.heads)
    generator = torch.Generator(on).manual_seed(seed)
    layers = shape.n_layers, batch
    heads = (*layers, shape.n_kv_heads)

    def some_of(share: float, *sizes: int) -> Tensor:
        """True for a random choice of that many entries of the last axis."""
        ranks = torch.rand(sizes, generator=generator, device=on).argsort(-1).argsort(-1)
        return ranks < max(round(share * sizes[-1]), int(share > 0))

    corrected_layers = some_of(corrections.layer_steps, n_steps, shape.n_layers * batch).view(n_steps, *layers)
    corrected = corrected_layers[..., None] & some_of(corrections.heads, n_steps, *heads)
    corrected[0] = True
    half = shape.head_size // 2
    sign = torch.ones(*heads, 1, 1, device=on)
    content = torch.randn(*heads, n_groups, shape.head_size - half, generator=generator, device=on)
    q = torch.empty(n_steps, *heads, n_groups, shape.head_size, device=on)
    for i in range(n_steps):
        turns = corrected[i][..., None, None]
        sign = torch.where(turns, -sign, sign)
        cosine = torch.where(turns, TURNED, STEADY)
        fresh = torch.randn(content.shape, generator=generator, device=on)
        content = cosine * content + (1 - cosine**2).sqrt() * fresh
        q[i, ..., :half] = sign
        q[i, ..., half:] = content
    return q.view(n_steps, *layers, shape.n_heads, shape.head_size), corrected
