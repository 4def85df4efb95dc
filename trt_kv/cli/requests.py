"""What the commands hand to ``trt_kv.cli.pipeline``: the options of the command line, grouped and checked."""

from dataclasses import dataclass
from pathlib import Path

from trt_kv.errors import UnknownNameError, UsageError
from trt_kv.policy import Policy
from trt_kv.presets import preset


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where the weights come from: the preset ``model``, or ``checkpoint`` (a folder or a hub id) read as that preset."""

    model: str
    checkpoint: str | None = None

    def __post_init__(self) -> None:
        preset(self.model)


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """How a recipe is found: ``samples`` prompts drawn with ``seed`` from ``prompts`` (a file; None: the bundled task)."""

    prompts: Path | None = None
    samples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError("a recipe needs at least one prompt", got=self.samples, expected="--samples >= 1")
        if self.seed < 0:
            raise UsageError("a seed counts from zero", got=self.seed, expected="--seed >= 0")


TARGETS = ("onnxruntime", "tensorrt")


@dataclass(frozen=True, kw_only=True)
class TargetPlan:
    """What runs the engine, and how it is compiled. ``profile`` (a preset or a .json file), ``dtype`` and ``timing_cache`` are
    TensorRT's; None: the default.
    """

    target: str = "onnxruntime"
    profile: str | None = None
    dtype: str | None = None
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UnknownNameError("target", self.target, TARGETS)
        given = {"--profile": self.profile, "--dtype": self.dtype, "--timing-cache": self.timing_cache}
        needless = [name for name, value in given.items() if value is not None]
        if self.target != "tensorrt" and needless:
            raise UsageError(
                f"{needless[0]} is for TensorRT",
                got=f"--target {self.target}",
                fix=f"add --target tensorrt, or leave {needless[0]} out",
            )


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One prompt and how to continue it; the values are checked by the runtime, for its Python callers as well."""

    prompt: str
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: tuple[str, ...]


def check_recipe_is_read(policy: Policy, recipe: Path | None) -> None:
    """Raise ``UsageError`` for a recipe that ``policy`` would ignore."""
    if recipe is not None and not policy.needs_recipe:
        raise UsageError(f"policy {policy.name!r} reads no recipe", got=f"--recipe {recipe}", fix="leave --recipe out")
