"""How the weight of one module is stored: the names, types and shapes of its tensors, and the codes and scales in them.

Matrices are ``[O, I]``, outputs and inputs, as ``nn.Linear`` has them; G is the number of groups of inputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.quantized.arithmetic import block_indices, dequantized, unpacked
from trt_kv.export.checkpoints.safetensors_file import StoredTensor

FP8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("F64", "F32", "F16", "BF16", "F8_E8M0", "U8")
"""Types of scales. U8 are the exponents of powers of 2, as in F8_E8M0 (OCP Microscaling Formats 1.0, section 5.4.1)."""
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's GEMM format: the columns, of eight, in the order in which an int32 holds them."""

Parts = Mapping[str, StoredTensor]
Tensors = Mapping[str, Tensor]


class Layout(Protocol):
    """One way to store a weight."""

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors of the module that hold the weight."""
        ...

    def shape_of(self, parts: Parts) -> tuple[int, ...]:
        """The weight's shape. ``CheckpointError`` if a part has another type or shape than the others imply."""
        ...

    def weight_of(self, tensors: Tensors) -> Tensor:
        """The weight [O, I] fp32. ``CheckpointError`` for values out of range."""
        ...


@dataclass(frozen=True, kw_only=True)
class ScaledLayout:
    """Codes in a type of their own: fp8 or int8 ``weight`` [O, I], with a scale, and perhaps a zero point, per tensor, output,
    group of inputs, or ``block`` (outputs, inputs). ``groups``: the tensor with the group of each input, if it is stored.
    """

    scale: str
    zero: str | None = None
    groups: str | None = None
    block: tuple[int | None, int | None] = (None, None)

    @property
    def parts(self) -> tuple[str, ...]:
        return _present("weight", self.scale, self.zero, self.groups)

    def shape_of(self, parts: Parts) -> tuple[int, ...]:
        weight, scale = parts["weight"], parts[self.scale]
        _check(weight, (*FP8, "I8"), None)
        _check(scale, SCALES, None)
        if len(weight.shape) != 2:
            raise _misshapen(weight, "a matrix")
        if self._grid_of(weight.shape, scale.shape) is None:
            raise _misshapen(scale, f"one scale per tensor, output or block {self.block} of {list(weight.shape)}")
        if self.zero is not None:
            _check(parts[self.zero], ("I8", *FP8, "F32", "F16", "BF16"), scale.shape)
        if self.groups is not None:
            _check(parts[self.groups], ("I32", "I64"), weight.shape[1:])
        return weight.shape

    def weight_of(self, tensors: Tensors) -> Tensor:
        codes_OI, scale = tensors["weight"], _scales(tensors[self.scale])
        grid = self._grid_of(tuple(codes_OI.shape), tuple(scale.shape))
        assert grid is not None
        (n_rows, n_columns), rows, columns = grid
        zero = None if self.zero is None else tensors[self.zero].float().reshape(n_rows, n_columns)
        if self.groups is not None:
            columns = _groups(tensors[self.groups], n_columns, columns)
        return dequantized(codes_OI, scale.reshape(n_rows, n_columns), zero, rows, columns)

    def _grid_of(self, shape: tuple[int, ...], of_scale: tuple[int, ...]) -> tuple[tuple[int, int], Tensor, Tensor] | None:
        """The scale's rows and columns, and those of each output and input; None if the shapes do not go together."""
        n_rows, n_columns = (*of_scale, 1, 1)[:2]
        if len(of_scale) > 2:
            return None
        rows = block_indices(shape[0], n_rows, self.block[0])
        columns = block_indices(shape[1], n_columns, self.block[1])
        return None if rows is None or columns is None else ((n_rows, n_columns), rows, columns)


@dataclass(frozen=True, kw_only=True)
class PackedLayout:
    """compressed-tensors' "pack-quantized": ``weight_packed`` [O, I * bits / 32] int32 along inputs, ``weight_shape``, a scale
    [O, G], and zero points packed along outputs unless it is symmetric. Codes are signed, stored with an offset.
    """

    n_bits: int
    group_size: int | None
    symmetric: bool
    groups: bool

    @property
    def parts(self) -> tuple[str, ...]:
        zero, groups = None if self.symmetric else "weight_zero_point", "weight_g_idx" if self.groups else None
        return _present("weight_packed", "weight_scale", "weight_shape", zero, groups)

    def shape_of(self, parts: Parts) -> tuple[int, ...]:
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        _check(parts["weight_shape"], ("I64", "I32"), (2,))
        n_outputs, n_inputs = _read_shape(parts["weight_shape"])
        _check(packed, ("I32",), (n_outputs, _n_words(n_inputs, self.n_bits)))
        _check(scale, SCALES[:4], (n_outputs, 1 if self.group_size is None else -(-n_inputs // self.group_size)))
        if not self.symmetric:
            _check(parts["weight_zero_point"], ("I32",), (_n_words(n_outputs, self.n_bits), scale.shape[1]))
        if self.groups:
            _check(parts["weight_g_idx"], ("I32", "I64"), (n_inputs,))
        return n_outputs, n_inputs

    def weight_of(self, tensors: Tensors) -> Tensor:
        n_outputs, n_inputs = tensors["weight_shape"].tolist()
        scale_OG = tensors["weight_scale"]
        codes_OI = unpacked(tensors["weight_packed"], self.n_bits, n_inputs)
        zero_OG = torch.full_like(scale_OG, 1 << (self.n_bits - 1), dtype=torch.float32)
        if not self.symmetric:
            zero_OG = unpacked(tensors["weight_zero_point"].T, self.n_bits, n_outputs).T
        stored = tensors["weight_g_idx"] if self.groups else None
        return _of_groups(codes_OI, scale_OG, zero_OG, self.group_size, stored)


@dataclass(frozen=True, kw_only=True)
class GptqLayout:
    """GPTQ's: ``qweight`` [I * bits / 32, O] int32 along inputs, ``qzeros`` [G, O * bits / 32] int32 along outputs, ``scales``
    [G, O], and perhaps ``g_idx`` [I]. The zero point is what is stored plus ``zero_offset``, 1 in version 1 of the format.
    """

    n_bits: int
    group_size: int | None
    zero_offset: int
    groups: bool

    @property
    def parts(self) -> tuple[str, ...]:
        return _present("qweight", "qzeros", "scales", "g_idx" if self.groups else None)

    def shape_of(self, parts: Parts) -> tuple[int, ...]:
        packed = parts["qweight"]
        _check(packed, ("I32",), None)
        if len(packed.shape) != 2:
            raise _misshapen(packed, "a matrix")
        n_inputs, n_outputs = packed.shape[0] * 32 // self.n_bits, packed.shape[1]
        n_groups = 1 if self.group_size is None else -(-n_inputs // self.group_size)
        _check(parts["scales"], SCALES[:4], (n_groups, n_outputs))
        _check(parts["qzeros"], ("I32",), (n_groups, _n_words(n_outputs, self.n_bits)))
        if self.groups:
            _check(parts["g_idx"], ("I32", "I64"), (n_inputs,))
        return n_outputs, n_inputs

    def weight_of(self, tensors: Tensors) -> Tensor:
        scale_OG = tensors["scales"].T
        n_outputs, n_inputs = len(scale_OG), len(tensors["qweight"]) * 32 // self.n_bits
        codes_OI = unpacked(tensors["qweight"].T, self.n_bits, n_inputs)
        zero_OG = unpacked(tensors["qzeros"], self.n_bits, n_outputs).T.float() + self.zero_offset
        return _of_groups(codes_OI, scale_OG, zero_OG, self.group_size, tensors["g_idx"] if self.groups else None)


@dataclass(frozen=True, kw_only=True)
class AwqLayout:
    """AutoAWQ's GEMM format, 4 bits: ``qweight`` [I, O / 8] int32 along outputs, eight of them in an order of its own,
    ``qzeros`` [G, O / 8] likewise unless ``symmetric``, ``scales`` [G, O].
    """

    group_size: int | None
    symmetric: bool

    @property
    def parts(self) -> tuple[str, ...]:
        return _present("qweight", "scales", None if self.symmetric else "qzeros")

    def shape_of(self, parts: Parts) -> tuple[int, ...]:
        packed = parts["qweight"]
        _check(packed, ("I32",), None)
        if len(packed.shape) != 2:
            raise _misshapen(packed, "a matrix")
        n_inputs, n_outputs = packed.shape[0], packed.shape[1] * len(_AWQ_ORDER)
        n_groups = 1 if self.group_size is None else -(-n_inputs // self.group_size)
        _check(parts["scales"], SCALES[:4], (n_groups, n_outputs))
        if not self.symmetric:
            _check(parts["qzeros"], ("I32",), (n_groups, packed.shape[1]))
        return n_outputs, n_inputs

    def weight_of(self, tensors: Tensors) -> Tensor:
        scale_OG, codes_OI = tensors["scales"].T, _in_order(tensors["qweight"]).T
        zero_OG = torch.full_like(scale_OG, 8.0) if self.symmetric else _in_order(tensors["qzeros"]).T
        return _of_groups(codes_OI, scale_OG, zero_OG, self.group_size)


def _in_order(packed_RW: Tensor) -> Tensor:
    """Unsigned 4-bit integers [R, 8 W] of AWQ's order."""
    values = unpacked(packed_RW, 4, 8 * packed_RW.shape[1]).reshape(len(packed_RW), -1, len(_AWQ_ORDER))
    return values[:, :, torch.tensor(_AWQ_ORDER).argsort()].reshape(len(packed_RW), -1)


def _of_groups(
    codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_size: int | None, stored_I: Tensor | None = None
) -> Tensor:
    """The weight [O, I], with a scale and a zero point for each output and group of inputs: groups of ``group_size``
    consecutive ones, None: one group; or those of ``stored_I``.
    """
    n_inputs = codes_OI.shape[1]
    by_size = torch.zeros(n_inputs, dtype=torch.int64) if group_size is None else torch.arange(n_inputs) // group_size
    columns = by_size if stored_I is None else _groups(stored_I, scale_OG.shape[1], by_size)
    return dequantized(codes_OI, scale_OG, zero_OG, torch.arange(len(codes_OI)), columns)


def _groups(stored_I: Tensor, n_groups: int, by_size_I: Tensor) -> Tensor:
    """The group of each input as stored; all -1 stands for groups of consecutive inputs."""
    if (stored_I == -1).all():
        return by_size_I
    if stored_I.min() < 0 or stored_I.max() >= n_groups:
        raise CheckpointError(
            "a quantised weight has inputs in groups that it does not have",
            got=f"groups {int(stored_I.min())} .. {int(stored_I.max())}",
            expected=f"0 .. {n_groups - 1}",
            fix="download the checkpoint again",
        )
    return stored_I.long()


def _scales(stored: Tensor) -> Tensor:
    return (stored.float() - 127.0).exp2() if stored.dtype == torch.uint8 else stored.float()


def _n_words(n: int, n_bits: int) -> int:
    return -(-n * n_bits // 32)


def _read_shape(stored: StoredTensor) -> tuple[int, int]:
    n_outputs, n_inputs = stored.read().tolist()
    return n_outputs, n_inputs


def _present(*names: str | None) -> tuple[str, ...]:
    return tuple(name for name in names if name is not None)


def _check(tensor: StoredTensor, dtypes: tuple[str, ...], shape: tuple[int, ...] | None) -> None:
    if tensor.dtype not in dtypes:
        raise CheckpointError(
            f"tensor {tensor.name!r} in {tensor.path} has another type than its quantisation says",
            got=tensor.dtype,
            expected="one of " + ", ".join(dtypes),
            fix="take config.json and the weights from the same checkpoint",
        )
    if shape is not None and tensor.shape != shape:
        raise _misshapen(tensor, str(list(shape)))


def _misshapen(tensor: StoredTensor, expected: str) -> CheckpointError:
    return CheckpointError(
        f"tensor {tensor.name!r} in {tensor.path} has another shape than its quantisation says",
        got=list(tensor.shape),
        expected=expected,
        fix="take config.json and the weights from the same checkpoint",
    )
