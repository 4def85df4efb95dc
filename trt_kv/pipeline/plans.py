"""The parts of a request: model, calibration, target and device. Each refuses invalid values.

Messages name the options of the command line that fill the fields.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trt_kv.digests import digest_of
from trt_kv.drift import check_correction_rate
from trt_kv.errors import UnknownNameError, UsageError
from trt_kv.manifest import DTYPES, KV_DTYPES, Quantization
from trt_kv.presets import preset
from trt_kv.runtime.backends.devices import HOST, DeviceOptions, check_host_dense

DEFAULT_CORRECTION_RATE = 0.1
DEFAULT_NEW_TOKENS = 64
DEFAULT_PAGE_SIZE = 32
_DIGEST_CHARACTERS = len("sha256:") + 12
TENSORRT_LLM = "tensorrt-llm"
TARGETS = ("onnxruntime", "tensorrt", TENSORRT_LLM)
QUANTS = {"none": None, "int8": 8, "int4": 4}
"""Bits of a weight, by name; None: weights are not quantised."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """Where the weights come from: ``checkpoint`` (a folder, a .gguf file, or a hub id ``owner/name[@revision][:file.gguf]``),
    and without one the preset ``model``, which is not read otherwise.

    ``context``: the positions of the engine; None: the model's own.
    """

    model: str
    checkpoint: str | None = None
    context: int | None = None

    def __post_init__(self) -> None:
        preset(self.model)
        if self.context is not None and self.context < 1:
            raise UsageError("the context is below 1", got=f"--context {self.context}", expected="--context >= 1")


@dataclass(frozen=True, kw_only=True)
class CalibrationPlan:
    """How a recipe or thresholds are found: ``samples`` prompts drawn with ``seed`` from the file ``prompts``.

    ``prompts`` None: synthetic English.
    """

    prompts: Path | None = None
    samples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UsageError("a calibration needs at least one prompt", got=self.samples, expected="--samples >= 1")
        if self.seed < 0:
            raise UsageError("the seed is negative", got=self.seed, expected="--seed >= 0")

    @property
    def source(self) -> str:
        """Where the prompts come from, as recipes and thresholds record it; of a file, which version of it."""
        if self.prompts is None:
            return "bundled synthetic English, calibration split"
        return f"{self.prompts.name}, {digest_of(self.prompts)[:_DIGEST_CHARACTERS]}"


@dataclass(frozen=True, kw_only=True)
class DriftPlan:
    """How drift thresholds are found: read from ``file``, or at the correction rate ``rate`` from ``tokens`` generated after
    each calibration prompt, recalling pages of ``page_size`` tokens. None: the default.
    """

    file: Path | None = None
    rate: float | None = None
    tokens: int | None = None
    page_size: int = DEFAULT_PAGE_SIZE

    def __post_init__(self) -> None:
        check_page_size(self.page_size)
        check_correction_rate(self.correction_rate, error=UsageError)
        if self.new_tokens < 1:
            raise UsageError("the number of generated tokens is below 1", got=self.tokens, expected="--new-tokens >= 1")
        if self.file is not None and self.tokens is not None:
            raise UsageError(
                "thresholds are either read from a file or measured",
                got="--drift and --new-tokens",
                expected="one of the two",
                fix="leave one out",
            )

    @property
    def correction_rate(self) -> float:
        return DEFAULT_CORRECTION_RATE if self.rate is None else self.rate

    @property
    def new_tokens(self) -> int:
        return DEFAULT_NEW_TOKENS if self.tokens is None else self.tokens

    @property
    def given(self) -> list[str]:
        """The options that were given."""
        options = {"--drift": self.file, "--correction-rate": self.rate, "--new-tokens": self.tokens}
        return [f"{name} {value}" for name, value in options.items() if value is not None]


def check_page_size(page_size: int) -> None:
    """``UsageError`` unless ``page_size`` is at least 1."""
    if page_size < 1:
        raise UsageError("the page size is below 1", got=page_size, expected="--page-size >= 1")


def check_kv_dtype(kv_dtype: str | None) -> None:
    """``UnknownNameError`` unless ``kv_dtype`` is a type of KV caches, or None."""
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise UnknownNameError("KV cache type", kv_dtype, KV_DTYPES)


@dataclass(frozen=True, kw_only=True)
class TargetPlan:
    """What runs the engine, and how it is compiled. ``page_size``: tokens per page of the KV cache. ``dtype``: compute type.
    ``kv_dtype``: what the KV cache is stored as; None: as computed. ``profile`` (a preset or a .json file) and ``timing_cache``
    are TensorRT's; None: the default.
    """

    target: str = "onnxruntime"
    profile: str | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    timing_cache: Path | None = None
    page_size: int = DEFAULT_PAGE_SIZE

    def __post_init__(self) -> None:
        check_page_size(self.page_size)
        if self.target not in TARGETS:
            raise UnknownNameError("target", self.target, TARGETS)
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UnknownNameError("type", self.dtype, DTYPES)
        check_kv_dtype(self.kv_dtype)
        given = {"--profile": self.profile, "--timing-cache": self.timing_cache}
        needless = [name for name, value in given.items() if value is not None]
        if self.target != "tensorrt" and needless:
            raise UsageError(
                f"{needless[0]} applies to TensorRT only",
                got=f"--target {self.target}",
                fix=f"add --target tensorrt, or leave {needless[0]} out",
            )


@dataclass(frozen=True, kw_only=True)
class WeightPlan:
    """How weights are stored: ``quant`` "none", "int8" or "int4", and the details of ``Quantization``; None: the default."""

    quant: str = "none"
    block_size: int | None = None
    symmetric: bool | None = None
    accuracy_level: int | None = None

    def __post_init__(self) -> None:
        if self.quant not in QUANTS:
            raise UnknownNameError("quantisation of weights", self.quant, tuple(QUANTS))
        if self.quantization is None and self.details:
            raise UsageError(
                f"{self.details[0]} applies to quantised weights only",
                got="--quant none",
                fix=f"add --quant int4, or leave {self.details[0]} out",
            )
        if self.quantization is not None:
            self.quantization.check(UsageError)

    @property
    def quantization(self) -> Quantization | None:
        """With the defaults filled in; None if weights are not quantised."""
        bits = QUANTS[self.quant]
        if bits is None:
            return None
        return Quantization(
            bits=bits,
            block_size=32 if self.block_size is None else self.block_size,
            symmetric=False if self.symmetric is None else self.symmetric,
            accuracy_level=4 if self.accuracy_level is None else self.accuracy_level,
        )

    @property
    def details(self) -> list[str]:
        """The options that were given beside --quant, as words of a command."""
        words = [f"--quant-block-size={self.block_size}"] if self.block_size is not None else []
        words += [f"--quant-{'symmetric' if self.symmetric else 'asymmetric'}"] if self.symmetric is not None else []
        words += [f"--quant-accuracy-level={self.accuracy_level}"] if self.accuracy_level is not None else []
        return words

    def check_target(self, target: TargetPlan) -> None:
        """``UsageError`` for a target or a type that has no quantised weights."""
        if self.quantization is None or (target.target == "onnxruntime" and target.dtype in (None, "float32")):
            return
        dtype = "" if target.dtype is None else f" --dtype {target.dtype}"
        raise UsageError(
            "quantised weights are for ONNX Runtime on a CPU",
            got=f"--quant {self.quant} with --target {target.target}{dtype}",
            expected="--target onnxruntime, and no --dtype",
            fix="leave --quant out",
        )


@dataclass(frozen=True, kw_only=True)
class DeviceChoice:
    """Where an engine runs, with which types and sizes; None: the default. Whether there is such a GPU is not checked."""

    device: str = HOST
    dense: str | None = None
    precision: str | None = None
    dtype: str | None = None
    profile: str | None = None

    def __post_init__(self) -> None:
        if self.on_host:
            check_host_dense(self.dense, self.precision)
        DeviceOptions(dense=None if self.on_host else self.dense, dtype=self.dtype)  # refuses unknown names
        given = {"--dtype": self.dtype, "--profile": self.profile}
        needless = [name for name, value in given.items() if value is not None]
        if self.on_host and needless:
            raise UsageError(
                f"{needless[0]} applies to devices only",
                got=f"--device {self.device}",
                fix=f"add --device cuda, or leave {needless[0]} out",
            )
        if not self.on_host and self.precision is not None:
            raise UsageError(
                "--precision applies to --dense openvino only",
                got=f"--device {self.device}",
                fix="leave --precision out; --dtype sets a device's type",
            )

    @property
    def on_host(self) -> bool:
        return self.device == HOST

    @property
    def options(self) -> dict[str, Any]:
        """Options of ``Engine.load``."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class ResourceChoice:
    """How much memory and how many threads an engine may use, and what its KV cache is stored as: options of ``Engine.load``;
    None: its default.
    """

    cache_tokens: int | None = None
    host_tier: str | None = None
    host_tokens: int | None = None
    chunk: int | None = None
    n_threads: int | None = None
    batch_invariant: bool | None = None
    kv_dtype: str | None = None
    prefix_cache: bool | None = None
    prefix_bytes: int | None = None
    prefix_store: str | None = None

    def __post_init__(self) -> None:
        check_kv_dtype(self.kv_dtype)

    def for_one_prompt(self) -> "ResourceChoice":
        """The same without a prefix cache that nothing could be found in, unless something is said about it."""
        is_useless = (self.prefix_cache, self.prefix_bytes, self.prefix_store) == (None, None, None)
        return replace(self, prefix_cache=False) if is_useless else self

    def options(self, *, has_host_tier: bool = True) -> dict[str, Any]:
        """Options of ``Engine.load``; without those of a host tier if the engine has none."""
        return {
            name: value
            for name, value in vars(self).items()
            if value is not None and (has_host_tier or not name.startswith("host_"))
        }
