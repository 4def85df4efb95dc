"""Random checkpoints of given shapes, exported like those of an engine, and runners for them."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import safetensors.torch
import torch
from tokenizers import Tokenizer

from trt_kv.calibration.prefixkv import calibrate_prefixkv_budgets
from trt_kv.calibration.tasks import calibration_prompts
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.graph import graph_from_checkpoint, save_graphs
from trt_kv.export.split import save_segments, segments_from_graph
from trt_kv.hf_config import model_config_from_hf
from trt_kv.manifest import AttentionPort, GraphSegment
from trt_kv.model_config import ModelConfig
from trt_kv.policies import policy_from_name
from trt_kv.policy import Policy
from trt_kv.program import PHASES, Program, program_of_model
from trt_kv.recipe import RecipeModel, RecipeScore
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.host.onnxruntime_segments import OnnxRuntimeExecutor
from trt_kv.runtime.backends.host.runner import host_runner
from trt_kv.runtime.backends.host.store import HostKvPool
from trt_kv.runtime.cache.kv_pool import KvPool
from trt_kv.runtime.model_runner import DEFAULT_CHUNK, ModelRunner

PAGE_SIZE = 32
FULL = policy_from_name("full")
PREFIXKV = policy_from_name("prefixkv_paper")
MASS = dataclasses.replace(PREFIXKV, budget="uniform", kept=1.0)
"""Scores every prompt query and keeps everything, so that only scoring is measured."""
WINDOW = dataclasses.replace(MASS, score="window", window=32)
DESCRIPTION_FILE = "model.json"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a random Llama; everything else is as in Llama 3."""

    n_layers: int
    hidden_size: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int = 4096
    max_positions: int = 65536

    @property
    def hf_config(self) -> dict[str, object]:
        """The config.json of a checkpoint of this shape."""
        return {
            "model_type": "llama",
            "num_hidden_layers": self.n_layers,
            "hidden_size": self.hidden_size,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.intermediate_size,
            "vocab_size": self.vocab_size,
            "max_position_embeddings": self.max_positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": True,
        }


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """The decode graph, its graph segments and their weights in ``folder``."""

    folder: Path
    config: ModelConfig
    segments: tuple[GraphSegment, ...]
    ports: tuple[AttentionPort, ...]

    @property
    def graph(self) -> onnx.ModelProto:
        """The monolithic decode graph, its weights left on disk."""
        return onnx.load(self.folder / "decode.onnx", load_external_data=False)

    def executor(self) -> OnnxRuntimeExecutor:
        return OnnxRuntimeExecutor(self.folder, self.segments, self.ports)


def random_checkpoint(shape: Shape, folder: Path, *, seed: int = 0) -> Checkpoint:
    """Write a checkpoint of ``shape`` into ``folder``, fp32, weights scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    config = model_config_from_hf(shape.hf_config, source="benchmark")
    weights = {name: _random_weight(size, generator) for name, size in config.tensor_shapes().items()}
    folder.mkdir(parents=True)
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(shape.hf_config))
    return open_checkpoint(folder)


def exported_model(checkpoint: Checkpoint, folder: Path) -> ExportedModel:
    """Export and split ``checkpoint`` as in a build, without the tokenizer, manifest and digests of an engine."""
    config = checkpoint.config
    folder.mkdir(parents=True)
    program = program_of_model(config, FULL, phase="decode", page_size=PAGE_SIZE)
    save_graphs({"decode": graph_from_checkpoint(checkpoint, program, page_size=PAGE_SIZE)}, folder)
    models, segments, ports = segments_from_graph(onnx.load(folder / "decode.onnx", load_external_data=False))
    save_segments(models, segments, folder)
    parts: dict[str, list[GraphSegment] | list[AttentionPort]] = {"segments": segments, "ports": ports}
    description = {"config": config.to_json()} | {
        name: [dataclasses.asdict(part) for part in listed] for name, listed in parts.items()
    }
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description))
    return opened_model(folder)


def opened_model(folder: Path) -> ExportedModel:
    """What ``exported_model`` wrote."""
    description = json.loads((folder / DESCRIPTION_FILE).read_text())
    segments = (
        GraphSegment(file=p["file"], inputs=tuple(p["inputs"]), outputs=tuple(p["outputs"])) for p in description["segments"]
    )
    return ExportedModel(
        folder=folder,
        config=ModelConfig.from_json(description["config"]),
        segments=tuple(segments),
        ports=tuple(AttentionPort(**port) for port in description["ports"]),
    )


def model_runner(
    executor: DenseExecutor,
    config: ModelConfig,
    *,
    cache_tokens: int = 0,
    pool: KvPool[Any] | None = None,
    policy: Policy = FULL,
    kept_shares: list[float] | None = None,
    chunk: int = DEFAULT_CHUNK,
    implementation: str = "cpu",
) -> ModelRunner:
    """A runner of ``policy`` with the given pool, or a new one for ``cache_tokens`` tokens in every layer."""
    pool = pool or host_pool(config, cache_tokens)
    programs = programs_of(policy, config, page_size=pool.page_size, kept_shares=kept_shares)
    return host_runner(
        executor, pool, programs, chunk=chunk, implementation=implementation, reading_reserve=policy.reading_reserve
    )


def host_pool(config: ModelConfig, cache_tokens: int) -> HostKvPool:
    """A pool for ``cache_tokens`` tokens in every layer."""
    return HostKvPool(
        n_pages=config.n_layers * -(-cache_tokens // PAGE_SIZE),
        page_size=PAGE_SIZE,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
    )


def programs_of(
    policy: Policy, config: ModelConfig, *, page_size: int = PAGE_SIZE, kept_shares: list[float] | None = None
) -> dict[str, Program]:
    """The policy's programs by phase; ``kept_shares``: of each layer, for a policy whose budgets are calibrated."""
    return {
        phase: program_of_model(config, policy, phase=phase, page_size=page_size, kept_shares=kept_shares) for phase in PHASES
    }


def calibrated_shares(
    checkpoint: Checkpoint, model: ExportedModel, executor: DenseExecutor, *, budgets: Sequence[float]
) -> dict[float, list[float]]:
    """PrefixKV's kept share of each layer by budget, calibrated on four synthetic prompts."""
    tokenizer = Tokenizer.from_file(str(checkpoint.tokenizer_file))
    prompts = [tokenizer.encode(task.prompt).ids for task in calibration_prompts(4, context_length=512, seed=0)]
    scored = dataclasses.replace(PREFIXKV, budget="uniform")
    recipes = calibrate_prefixkv_budgets(
        prompts,
        model_runner(executor, model.config, policy=scored, cache_tokens=1024).importance,
        budgets=budgets,
        score=RecipeScore(name="mass"),
        model=RecipeModel(name=checkpoint.name, digest=checkpoint.digest, n_layers=model.config.n_layers),
        source="bundled synthetic English, calibration split",
        seed=0,
    )
    return {recipe.budget: list(recipe.kept) for recipe in recipes}


def random_tokens(n_tokens: int, vocab_size: int, *, seed: int = 0) -> list[int]:
    """``n_tokens`` token ids."""
    return [int(token) for token in np.random.default_rng(seed).integers(vocab_size, size=n_tokens)]


def _random_weight(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(size, generator=generator)
    return 1.0 + 0.1 * noise if len(size) == 1 else noise / math.sqrt(size[-1])
