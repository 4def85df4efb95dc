"""The ``quantization_config`` of ``config.json``: which scheme it is, and how it stores the weight of each module."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.quantized.layouts import (
    FP8,
    AwqLayout,
    GptqLayout,
    Layout,
    PackedLayout,
    Parts,
    ScaledLayout,
)

_SUPPORTED = "fp8, fbgemm_fp8, compressed-tensors, gptq or awq"
_DEQUANTIZE = (
    "take the original checkpoint; or dequantise this one with transformers: "
    "AutoModelForCausalLM.from_pretrained(...).dequantize().save_pretrained(...)"
)
_ORIGINAL = "take the original checkpoint, or one in fp8, compressed-tensors, GPTQ or AWQ"
_PACKED_BITS = (1, 2, 4, 8)
"""Those that divide 32; others cross the borders of words, differently in versions of the formats."""
_SCALED_FORMATS = ("naive-quantized", "float-quantized", "int-quantized")


class Scheme(Protocol):
    """A way to quantise the weights of a model."""

    @property
    def name(self) -> str: ...

    @property
    def unread_parts(self) -> tuple[str, ...]:
        """Tensors of a quantised module that say nothing that is needed."""
        ...

    @property
    def adds_biases(self) -> bool:
        """Whether modules without a bias are given one of zeros."""
        ...

    def layout_of(self, module: str, parts: Parts) -> Layout | None:
        """How a module's weight is stored, given all of its tensors; None if it is not quantised."""
        ...


@dataclass(frozen=True, kw_only=True)
class Fp8Scheme:
    """DeepSeek's and Qwen3's blocks (``weight_scale_inv``), and one scale per tensor or output (``weight_scale``)."""

    name: str
    block: tuple[int | None, int | None]
    unread_parts: tuple[str, ...] = ()
    adds_biases: bool = False

    def layout_of(self, module: str, parts: Parts) -> Layout | None:
        if "weight" not in parts or parts["weight"].dtype not in FP8:
            return None
        scale = "weight_scale_inv" if "weight_scale_inv" in parts else "weight_scale"
        return ScaledLayout(scale=scale, block=self.block)


@dataclass(frozen=True, kw_only=True)
class Group:
    """A group of modules of compressed-tensors that are quantised alike; ``targets``: as there."""

    targets: tuple[str, ...]
    format: str
    n_bits: int
    strategy: str
    symmetric: bool
    block: tuple[int | None, int | None]

    def matches(self, module: str) -> int:
        """How closely a target names the module: 3 by its name, 2 by a pattern, 1 by its class, 0 not at all."""
        return max((_closeness(target, module) for target in self.targets), default=0)


@dataclass(frozen=True, kw_only=True)
class CompressedTensorsScheme:
    """vLLM's compressed-tensors: formats naive-, float-, int- and pack-quantized."""

    groups: tuple[Group, ...]
    name: str = "compressed-tensors"
    unread_parts: tuple[str, ...] = ("weight_zero_point", "weight_g_idx")
    adds_biases: bool = False

    def layout_of(self, module: str, parts: Parts) -> Layout | None:
        is_packed = "weight_packed" in parts
        is_narrow = "weight" in parts and ("weight_scale" in parts or parts["weight"].dtype in (*FP8, "I8"))
        if not is_packed and not is_narrow:
            return None
        group = max(self.groups, key=lambda group: group.matches(module), default=None)
        if group is None or not group.matches(module) or is_packed != (group.format == "pack-quantized"):
            raise CheckpointError(
                f"the weight of {module!r} is not stored as config.json says",
                got=", ".join(sorted(parts)),
                expected=group.format if group and group.matches(module) else "a group of the quantization_config with it",
                fix="take config.json and the weights from the same checkpoint",
            )
        groups = group.strategy == "group" and "weight_g_idx" in parts
        if is_packed:
            return PackedLayout(n_bits=group.n_bits, group_size=group.block[1], symmetric=group.symmetric, groups=groups)
        zero = "weight_zero_point" if "weight_zero_point" in parts or not group.symmetric else None
        return ScaledLayout(scale="weight_scale", zero=zero, groups="weight_g_idx" if groups else None, block=group.block)


@dataclass(frozen=True, kw_only=True)
class GptqScheme:
    """GPTQ (arXiv 2210.17323) in the format of AutoGPTQ and GPTQModel, versions 1 and 2."""

    n_bits: int
    group_size: int | None
    zero_offset: int
    name: str = "gptq"
    unread_parts: tuple[str, ...] = ("g_idx",)
    adds_biases: bool = True

    def layout_of(self, module: str, parts: Parts) -> Layout | None:
        if "qweight" not in parts:
            return None
        return GptqLayout(n_bits=self.n_bits, group_size=self.group_size, zero_offset=self.zero_offset, groups="g_idx" in parts)


@dataclass(frozen=True, kw_only=True)
class AwqScheme:
    """AWQ (arXiv 2306.00978) in AutoAWQ's GEMM format."""

    group_size: int | None
    symmetric: bool
    name: str = "awq"
    unread_parts: tuple[str, ...] = ("qzeros",)
    adds_biases: bool = True

    def layout_of(self, module: str, parts: Parts) -> Layout | None:
        return AwqLayout(group_size=self.group_size, symmetric=self.symmetric) if "qweight" in parts else None


def scheme_from_hf(config: Mapping[str, Any], *, source: str) -> Scheme | None:
    """The scheme of a parsed ``config.json``, which ``source`` names; None if the weights are not quantised.

    ``CheckpointError``, with the scheme's name and what to do, for one that is not read.
    """
    given = config.get("quantization_config") or config.get("compression_config")
    if not given:
        return None
    if not isinstance(given, Mapping):
        raise CheckpointError(f"bad quantization_config in {source}", got=repr(given), expected="an object")
    read = _Settings(given, source)
    method = str(given.get("quant_method", "none")).lower().replace("_", "-")
    match method:
        case "fp8" | "fbgemm-fp8":
            return _fp8(read, method)
        case "compressed-tensors" | "sparseml":
            return _compressed_tensors(read)
        case "gptq":
            return _gptq(read)
        case "awq":
            return _awq(read)
    undoes = method in ("bitsandbytes", "torchao", "hqq", "mxfp4", "quanto", "gguf")
    raise read.refusal(f"the method {given.get('quant_method')!r}", _SUPPORTED, _DEQUANTIZE if undoes else _ORIGINAL)


def _fp8(read: "_Settings", method: str) -> Scheme:
    blocks = read.given.get("weight_block_size")
    if blocks is not None and not (isinstance(blocks, Sequence) and len(blocks) == 2 and all(map(_is_size, blocks))):
        raise read.refusal(f"weight_block_size {blocks!r}", "two sizes, or null", _ORIGINAL)
    return Fp8Scheme(name=method, block=(None, None) if blocks is None else (blocks[0], blocks[1]))


def _compressed_tensors(read: "_Settings") -> Scheme:
    found = read.given.get("sparsity_config") or {}
    sparsity = found.get("format", "dense") if isinstance(found, Mapping) else found
    if sparsity != "dense":
        raise read.refusal(f"sparsity of format {sparsity!r}", "dense weights", _ORIGINAL)
    if read.given.get("transform_config"):
        raise read.refusal("rotations (transform_config)", "weights without transforms", _ORIGINAL)
    groups = read.given.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise read.refusal(f"config_groups {groups!r}", "groups of modules", _ORIGINAL)
    whole = read.given.get("format")
    return CompressedTensorsScheme(groups=tuple(_group(read, group, whole) for group in groups.values() if _has_weights(group)))


def _has_weights(group: Any) -> bool:
    return not isinstance(group, Mapping) or group.get("weights") is not None


def _group(read: "_Settings", group: Any, whole: Any) -> Group:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    targets = group.get("targets") if isinstance(group, Mapping) else None
    if not isinstance(weights, Mapping) or not isinstance(targets, list) or not all(isinstance(name, str) for name in targets):
        raise read.refusal(f"the group {group!r}", "targets and weights", _ORIGINAL)
    form, n_bits, kind = group.get("format") or whole, weights.get("num_bits"), weights.get("type", "int")
    if form not in (*_SCALED_FORMATS, "pack-quantized"):
        raise read.refusal(f"the format {form!r}", f"{', '.join(_SCALED_FORMATS)} or pack-quantized", _ORIGINAL)
    packed = form == "pack-quantized"
    if not isinstance(n_bits, int) or n_bits not in (_PACKED_BITS if packed else (8,)) or (packed and kind != "int"):
        raise read.refusal(f"{n_bits} bits of type {kind} in the format {form}", "integers of 4 or 8 bits, or fp8", _ORIGINAL)
    strategy, block = _blocks(read, weights, packed=packed)
    symmetric = weights.get("symmetric", True) is not False
    return Group(targets=tuple(targets), format=form, n_bits=n_bits, strategy=strategy, symmetric=symmetric, block=block)


def _blocks(read: "_Settings", weights: Mapping[str, Any], *, packed: bool) -> tuple[str, tuple[int | None, int | None]]:
    """The strategy of a group's scales, and the outputs and inputs that have one in common."""
    strategy, size, block = weights.get("strategy"), weights.get("group_size"), weights.get("block_structure")
    if strategy is None:
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    if strategy == "channel" or (strategy == "tensor" and not packed):
        return strategy, (None, None)
    if strategy == "group" and _is_size(size):
        return strategy, (None, size)
    if strategy == "block" and not packed and isinstance(block, list) and len(block) == 2 and all(map(_is_size, block)):
        return strategy, (block[0], block[1])
    raise read.refusal(f"scales by {strategy} (group_size {size}, block_structure {block})", "by channel or group", _ORIGINAL)


def _closeness(target: str, module: str) -> int:
    if target.startswith("re:"):
        try:
            return 2 * (re.match(target[3:], module) is not None)
        except re.error:
            return 0
    return 3 * (target == module) or 1 * (target == "Linear")


def _gptq(read: "_Settings") -> Scheme:
    n_bits = read.size("bits")
    if n_bits not in (2, 4, 8):
        raise read.refusal(f"{n_bits} bits", "2, 4 or 8", _ORIGINAL)
    form = read.given.get("checkpoint_format") or "gptq"
    if form not in ("gptq", "gptq_v2") or read.given.get("is_marlin_format"):
        raise read.refusal(f"checkpoint_format {form!r}", "'gptq' or 'gptq_v2'", _ORIGINAL)
    return GptqScheme(n_bits=n_bits, group_size=read.group_size(), zero_offset=int(form == "gptq"))


def _awq(read: "_Settings") -> Scheme:
    n_bits, form = read.size("bits"), str(read.given.get("version") or read.given.get("format") or "gemm").lower()
    if n_bits != 4 or form != "gemm":
        raise read.refusal(f"{n_bits} bits in the format {form!r}", "4 bits in the format 'gemm'", _ORIGINAL)
    return AwqScheme(group_size=read.group_size(), symmetric=read.given.get("zero_point", True) is False)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


@dataclass(frozen=True)
class _Settings:
    """The quantization_config ``given`` in the file ``source``."""

    given: Mapping[str, Any]
    source: str

    def size(self, name: str) -> int:
        value = self.given.get(name)
        if not isinstance(value, int) or not _is_size(value):
            raise self.refusal(f"{name} {value!r}", "a number of 1 or more", _ORIGINAL)
        return value

    def group_size(self) -> int | None:
        """Inputs per group; None: all in one."""
        return None if self.given.get("group_size", -1) == -1 else self.size("group_size")

    def refusal(self, got: str, expected: str, fix: str) -> CheckpointError:
        method = self.given.get("quant_method")
        return CheckpointError(
            f"{self.source} describes quantised weights that trt-kv does not read ({method})",
            got=got,
            expected=expected,
            fix=fix,
        )
