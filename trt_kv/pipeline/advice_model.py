"""The model that advice is about: an engine, or a checkpoint from which one can be built."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trt_kv.cache_layers import cache_config, heads_apart
from trt_kv.engine_files import check_files
from trt_kv.errors import UsageError
from trt_kv.manifest import FILE_NAME as MANIFEST_FILE
from trt_kv.manifest import Manifest, load_manifest
from trt_kv.model_config import ModelConfig
from trt_kv.pipeline.advice import WeightSize
from trt_kv.pipeline.callbacks import OnNote
from trt_kv.pipeline.plans import DEFAULT_PAGE_SIZE, QUANTS, ModelSource, WeightPlan
from trt_kv.pipeline.sources import open_source
from trt_kv.policy import Policy
from trt_kv.presets import PRESETS
from trt_kv.program import PHASES, Program, program_of_model
from trt_kv.weight_index import part_item_bytes

if TYPE_CHECKING:
    from trt_kv.export.checkpoints.base import Checkpoint


@dataclass(frozen=True, kw_only=True)
class PlannedPolicy:
    """A policy for the model of ``config``, with the programs of an engine. ``applied``: what it decides in this model."""

    policy: Policy
    applied: Policy
    programs: Mapping[str, Program]
    config: ModelConfig
    is_engine: bool = False

    @property
    def heads_apart(self) -> int:
        """Layers of the cache per layer of the model."""
        return heads_apart(self.config, self.applied)

    @property
    def cache(self) -> ModelConfig:
        """The config as the cache has it (``trt_kv/cache_layers.py``)."""
        return cache_config(self.config, self.applied)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """``engine``: its folder and manifest; None for a checkpoint. ``weights``: the first is what an engine has by default."""

    name: str
    source: str
    config: ModelConfig
    weights: tuple[WeightSize, ...]
    page_size: int
    kv_dtype: str
    engine: tuple[Path, Manifest] | None = None

    def planned(self, policy: Policy) -> PlannedPolicy:
        """``policy`` for this model; without a recipe each layer has the mean share."""
        size = self.page_size
        programs = {phase: program_of_model(self.config, policy, phase=phase, page_size=size) for phase in PHASES}
        applied = policy.applied_to(self.config.windows)
        return PlannedPolicy(policy=policy, applied=applied, programs=programs, config=self.config)

    def own_policy(self) -> PlannedPolicy | None:
        """That of the engine, with the budgets that it was built with."""
        if self.engine is None:
            return None
        manifest = self.engine[1]
        return PlannedPolicy(
            policy=manifest.policy,
            applied=manifest.applied_policy,
            programs=manifest.programs,
            config=self.config,
            is_engine=True,
        )


def open_subject(model: str, *, page_size: int | None, kv_dtype: str | None, on_note: OnNote) -> Subject:
    """What ``model`` names: an engine folder, a preset, or a checkpoint as for ``--checkpoint``.

    ``page_size`` and ``kv_dtype``: None for those of the engine, or the default. Raises ``UsageError`` for an engine that is
    not for a CPU, ``EngineError`` or ``CheckpointError`` for what cannot be read.
    """
    folder = Path(model).expanduser()
    if (folder / MANIFEST_FILE).is_file():
        return _engine(folder, page_size=page_size, kv_dtype=kv_dtype)
    is_preset = model in PRESETS
    source = ModelSource(model=model if is_preset else next(iter(PRESETS)), checkpoint=None if is_preset else model)
    checkpoint = open_source(source, on_note)
    size = page_size or DEFAULT_PAGE_SIZE
    checkpoint.config.check_page_size(size)
    return Subject(
        name=checkpoint.name,
        source=model,
        config=checkpoint.config,
        weights=tuple(WeightSize(quant=quant, n_bytes=weight_bytes(checkpoint, quant)) for quant in QUANTS),
        page_size=size,
        kv_dtype=kv_dtype or "float32",
    )


def _engine(folder: Path, *, page_size: int | None, kv_dtype: str | None) -> Subject:
    manifest = load_manifest(folder)
    check_files(folder, manifest)
    if manifest.plan is not None or manifest.dtype != "float32":
        raise UsageError(
            "advice is about memory and time of a CPU",
            got=f"an engine for {manifest.target} in {manifest.dtype}",
            expected="an engine for onnxruntime in float32, or a checkpoint",
            fix="for GPUs, docs/devices.md tells what --device cuda plans",
        )
    if page_size not in (None, manifest.page_size):
        raise UsageError(
            "an engine has the page size that it was built with", got=page_size, expected=manifest.page_size, fix="leave it out"
        )
    stored = sum(record.n_bytes for name, record in manifest.files.items() if name.endswith(".data"))
    bits = None if manifest.quantization is None else manifest.quantization.bits
    quant = next(name for name, of_name in QUANTS.items() if of_name == bits)
    return Subject(
        name=manifest.model_name,
        source=str(folder),
        config=manifest.config,
        weights=(WeightSize(quant=quant, n_bytes=stored),),
        page_size=manifest.page_size,
        kv_dtype=kv_dtype or manifest.kv_dtype,
        engine=(folder, manifest),
    )


def weight_bytes(checkpoint: "Checkpoint", quant: str) -> int:
    """Bytes of the weights of an engine of ``checkpoint`` with ``--quant quant``: blocks of integers, the others in fp32."""
    from trt_kv.export.packed_weights import PackedWeights

    quantization = WeightPlan(quant=quant).quantization
    formats = {} if quantization is None else PackedWeights(checkpoint, quantization).formats
    total = 0
    for name, shape in checkpoint.config.tensor_shapes().items():
        if name in formats:
            parts = formats[name].part_shapes(shape)
            total += sum(math.prod(of_part) * part_item_bytes(part) for part, of_part in parts.items())
        else:
            total += math.prod(shape) * 4
    return total
