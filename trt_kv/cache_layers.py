"""The layers of a KV cache: those of the model, or one for each KV head if every head has a budget of its own.

A layer of the cache has its own pages, length and eviction. With heads "own" a model of L layers and K KV heads has L * K of
them with one KV head each, layer by layer: head k of layer l is l * K + k. So a head that keeps less frees its pages.
"""

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from trt_kv.model_config import ModelConfig
from trt_kv.policy import Policy

T = TypeVar("T")


def heads_apart(config: ModelConfig, policy: Policy) -> int:
    """How many layers of the cache a layer of the model has under ``policy``, as it applies to the model: K or 1."""
    return config.n_kv_heads if policy.heads == "own" else 1


def cache_config(config: ModelConfig, policy: Policy) -> ModelConfig:
    """Numbers of layers and heads, and windows, as the cache has them; the rest is the model's.

    ``policy``: as it applies to the model.
    """
    n_apart = heads_apart(config, policy)
    if n_apart == 1:
        return config
    return dataclasses.replace(
        config,
        n_layers=config.n_layers * n_apart,
        n_heads=config.group_size,
        n_kv_heads=1,
        windows=tuple(each_repeated(config.windows, n_apart)),
        local_rope=None,
        local_rope_layers=(),
        unrotated_layers=(),
    )


def cache_policy(policy: Policy, n_apart: int) -> Policy:
    """``policy`` with the numbers of its exempt layers as the cache counts them."""
    if n_apart == 1:
        return policy
    exempt = [layer * n_apart + head for layer in policy.exempt_layers for head in range(n_apart)]
    return dataclasses.replace(policy, exempt_layers=tuple(exempt))


def each_repeated(values_L: Sequence[T], n_apart: int) -> list[T]:
    """A value of each layer of the model, for each layer of the cache."""
    return [value for value in values_L for _ in range(n_apart)]


def layer_name(cache_layer: int, n_apart: int) -> str:
    """E.g. "3", or "3.1" for the second KV head of layer 3."""
    return str(cache_layer) if n_apart == 1 else f"{cache_layer // n_apart}.{cache_layer % n_apart}"
