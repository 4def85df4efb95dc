"""Small random models with attention windows and a soft cap, and what they compute in plain dense attention."""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trt_kv.decoder import Decoder
from trt_kv.model_config import ModelConfig, RopeConfig
from trt_kv.plugins.paging import Floats
from trt_kv.policy import Policy
from trt_kv.program import PHASES, Program, program_of_model
from trt_kv.runtime.backends.host.recall.background import ThreadedCopies
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.store import RamTier
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.backends.host.torch_decoder import TorchDecoderExecutor
from trt_kv.runtime.model_runner import ModelRunner

CONFIG = ModelConfig(
    architecture="llama",
    n_layers=3,
    hidden_size=24,
    n_heads=6,
    n_kv_heads=3,
    head_dim=10,
    intermediate_size=28,
    vocab_size=37,
    rms_norm_eps=1e-5,
    max_positions=512,
    rope=RopeConfig(theta=10000.0),
)


@cache
def random_decoder(seed: int = 0) -> Decoder:
    """A decoder of ``CONFIG`` whose attention is far from uniform, so that what it may see matters."""
    decoder = Decoder(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return decoder.requires_grad_(False).eval()


def windowed_config(windows: Sequence[int], *, soft_cap: float = 0.0, scale: float = 0.0) -> ModelConfig:
    """``CONFIG`` with these windows; layer weights are those of ``random_decoder``."""
    return dataclasses.replace(CONFIG, windows=tuple(windows), attention_soft_cap=soft_cap, attention_scale=scale)


def programs_of(
    config: ModelConfig, policy: Policy, page_size: int, kept_shares: Sequence[float] | None = None
) -> dict[str, Program]:
    return {
        phase: program_of_model(config, policy, phase=phase, page_size=page_size, kept_shares=kept_shares) for phase in PHASES
    }


def windowed_runner(
    config: ModelConfig,
    policy: Policy,
    *,
    page_size: int,
    chunk: int,
    n_pages: int = 300,
    kept_shares: Sequence[float] | None = None,
    streamed: bool = False,
    implementation: str = "cpu",
) -> ModelRunner:
    """``streamed``: layers that recall have their cache on the host, and pages are copied in the background."""
    sizes: dict[str, Any] = {"page_size": page_size, "n_kv_heads": config.n_kv_heads, "head_size": config.head_dim}
    pool = HostKvPool(n_pages=n_pages, **sizes, n_query_heads=config.n_heads if policy.recalls and not streamed else 0)
    recall = None
    if streamed:
        tier = RamTier(n_pages=n_pages, **sizes)
        recall = StreamedRecall(tier, pool, ThreadedCopies(), n_layers=config.n_layers, finds_budgets=False)
    programs = programs_of(config, policy, page_size, kept_shares)
    return host_runner(
        TorchDecoderExecutor(random_decoder()),
        pool,
        programs,
        implementation=implementation,
        recall=recall,
        chunk=chunk,
        decode=policy.decode,
        decode_distance=policy.decode_distance,
        reading_reserve=policy.reading_reserve,
    )


def dense_logits(
    config: ModelConfig,
    ids: Sequence[int],
    seen: Mapping[int, np.ndarray] | None = None,
    *,
    decoder: Decoder | None = None,
) -> Floats:
    """Logits [N, V] of every token by masked attention over the whole text; ``decoder`` None: ``random_decoder``.

    A token sees the window of its layer. ``seen`` [K, N, N] bool, by layer: the tokens that each one sees instead.
    """
    n = len(ids)
    ago_NN = np.arange(n)[:, None] - np.arange(n)[None, :]
    masks: list[Any] = []
    for layer in range(config.n_layers):
        window = config.windows[layer] if config.windows else 0
        own_NN = (ago_NN >= 0) & ((ago_NN < window) | (window == 0))
        masks.append((seen or {}).get(layer, np.broadcast_to(own_NN, (config.n_kv_heads, n, n))))

    def attend(layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        q, k, v = (x.double().numpy() for x in (q_NHD, k_NKD, v_NKD))
        k, v = k.repeat(config.group_size, axis=1), v.repeat(config.group_size, axis=1)
        logits_HNS = np.einsum("nhd,shd->hns", q, k) * config.scale
        if config.attention_soft_cap:
            logits_HNS = config.attention_soft_cap * np.tanh(logits_HNS / config.attention_soft_cap)
        logits_HNS = np.where(masks[layer].repeat(config.group_size, axis=0), logits_HNS, -np.inf)
        weights_HNS = np.exp(logits_HNS - logits_HNS.max(axis=2, keepdims=True))
        weights_HNS /= weights_HNS.sum(axis=2, keepdims=True)
        return torch.from_numpy(np.einsum("hns,shd->nhd", weights_HNS, v)).to(q_NHD.dtype)

    with torch.inference_mode():
        logits: Floats = (decoder or random_decoder())(torch.tensor(ids), torch.arange(n), torch.arange(n), attend).numpy()
    return logits
