"""The sides of the recall benchmarks: at a context all sides read the same pages, from a pool or a file with equal content."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Check, check_close
from benchmarks.models import PAGE_SIZE, Shape, exported_model, model_runner, random_checkpoint, random_tokens
from benchmarks.speed.recall_cache import FREEKV, PoolTier, RecallSide, SharedTier, fill_pages, recall_side
from benchmarks.speed.synchronous_copies import SynchronousCopies
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.paging import Floats
from trt_kv.policy import Policy
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.recall.background import ThreadedCopies
from trt_kv.runtime.backends.host.recall.store import HostTier, host_tier_at
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.model_runner import ModelRunner

FULL, STREAMED, IN_TURN, AT_ONCE = "whole cache", "streamed", "not overlapped", "all at once"
OWN_PAGES = 8
"""Room for generated tokens, in pages per layer."""
WIDE = Shape(n_layers=16, hidden_size=2048, n_heads=32, n_kv_heads=8, head_dim=64, intermediate_size=8192, max_positions=2**18)
"""The shape of Llama 3.2 1B, except the vocabulary."""
NARROW = Shape(n_layers=2, hidden_size=128, n_heads=8, n_kv_heads=2, head_dim=16, intermediate_size=256, max_positions=2**18)


@dataclass(frozen=True, kw_only=True)
class WholeCacheSide:
    """A sequence whose whole cache is in the pool."""

    runner: ModelRunner
    sequence: SequenceCache

    def decode(self, n_steps: int = 1) -> Floats:
        """Run steps, which also extend the context; returns the last logits [V]."""
        logits_V: Floats = np.empty(0, np.float32)
        for _ in range(n_steps):
            logits_V = self.runner.decode([self.sequence], [5])[0]
        return logits_V

    def turn(self, n_steps: int) -> None:
        self.decode(n_steps)


Side = WholeCacheSide | RecallSide


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Random content for all sides and contexts: pages in a pool and in a file, their summaries, and room to grow."""

    pool: HostKvPool
    tiers: Mapping[str, HostTier]
    summaries: Floats
    folder: Path


def pages_for(config: ModelConfig, n_tokens: int, folder: Path) -> Pages:
    """Random pages for ``n_tokens`` in every layer, in memory and in a file without a name in ``folder``."""
    n_pages = config.n_layers * n_tokens // PAGE_SIZE
    n_all = n_pages + config.n_layers * OWN_PAGES
    sizes: dict[str, Any] = {"page_size": PAGE_SIZE, "n_kv_heads": config.n_kv_heads, "head_size": config.head_dim}
    pool = HostKvPool(n_pages=n_all, **sizes)
    summaries = np.empty((n_all, config.n_kv_heads, 2, config.head_dim), np.float32)
    ram = PoolTier(pool)
    fill_pages(ram, summaries, n_pages)
    file = host_tier_at(f"file:{folder}", n_pages=n_pages, **sizes)
    for page in range(n_pages):
        file.write(page, pool.kv[page])
    return Pages(pool=pool, tiers={"ram": ram, "file": file}, summaries=summaries, folder=folder)


def whole_cache_side(executor: DenseExecutor, config: ModelConfig, pages: Pages, context: int) -> WholeCacheSide:
    """Growing overwrites pages of longer contexts, so longer contexts must be measured first."""
    n_pages = config.n_layers * (context // PAGE_SIZE + OWN_PAGES)
    pool = HostKvPool(n_pages=n_pages, page_size=PAGE_SIZE, n_kv_heads=config.n_kv_heads, head_size=config.head_dim)
    pool.kv = pages.pool.kv[:n_pages]
    runner = model_runner(executor, config, pool=pool)
    sequence = runner.new_sequence()
    sequence.append(context)
    return WholeCacheSide(runner=runner, sequence=sequence)


def recall_sides(
    executor: DenseExecutor, config: ModelConfig, pages: Pages, policy: Policy, context: int, first_LHD: Floats, tier: str
) -> dict[str, RecallSide]:
    """Streamed, not overlapped, all at once; each with its own working set."""
    sizes: dict[str, Any] = {"page_size": PAGE_SIZE, "n_kv_heads": config.n_kv_heads, "head_size": config.head_dim}
    where = {"ram": "ram", "file": f"file:{pages.folder}"}[tier]
    sides = {}
    for name, tau, copies in (
        (STREAMED, policy.tau, ThreadedCopies()),
        (IN_TURN, policy.tau, SynchronousCopies()),
        (AT_ONCE, 1.01, SynchronousCopies()),
    ):
        own = host_tier_at(where, n_pages=config.n_layers * OWN_PAGES, **sizes)
        host = SharedTier(pages.tiers[tier], own, n_shared=config.n_layers * context // PAGE_SIZE)
        sides[f"{name}, {tier}"] = recall_side(
            executor,
            config,
            host,
            copies,
            n_tokens=context,
            queries_LHD=first_LHD,
            policy=dataclasses.replace(policy, tau=tau),
            summaries=pages.summaries,
        )
    return sides


def check_placed(folder: Path) -> Check:
    """Check that a placed cache decodes, bit for bit, like one from a real prefill."""
    model = exported_model(random_checkpoint(NARROW, folder / "narrow"), folder / "narrow-graphs")
    config = model.config
    policy = dataclasses.replace(FREEKV, tokens=512)
    sizes: dict[str, Any] = {"page_size": PAGE_SIZE, "n_kv_heads": config.n_kv_heads, "head_size": config.head_dim}
    n_tokens, n_steps = 1024, 12
    n_pages = config.n_layers * n_tokens // PAGE_SIZE
    host = host_tier_at("ram", n_pages=n_pages + config.n_layers, **sizes)
    executor = model.executor()
    read = recall_side(executor, config, host, ThreadedCopies(), policy=policy)
    read.runner.chunk = n_tokens
    read.runner.prefill(read.sequence, random_tokens(n_tokens, config.vocab_size))
    read.settle()
    first_pages = [int(page) for page in read.sequence.page_table[:, 0]]
    queries = [read.recall.sets[page].query_HD for page in first_pages]
    own = host_tier_at("ram", n_pages=config.n_layers, **sizes)
    placed = recall_side(
        executor,
        config,
        SharedTier(host, own, n_shared=n_pages),
        SynchronousCopies(),
        n_tokens=n_tokens,
        queries_LHD=np.stack([query_HD for query_HD in queries if query_HD is not None]),
        policy=policy,
        summaries=read.recall.summaries,
    )
    logits = [np.stack([side.decode() for _ in range(n_steps)]) for side in (placed, read)]
    placed.close()
    read.close()
    return check_close("logits of a cache that was placed and of one that was read", *logits, within=0.0)
