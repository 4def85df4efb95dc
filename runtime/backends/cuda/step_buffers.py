"""The tensors of a step on a device: allocated once for the largest step, filled with one copy per step, padded to buckets."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from trt_kv.errors import CapacityError, UsageError
from trt_kv.opspec import TensorSpec
from trt_kv.runtime.backends.step import Ints, Step

_ALIGNMENT = 16
"""Tensors begin at multiples of this number of int64 elements: 128 bytes."""
_PADDING = {"page_table": -1, "prompt_remaining": -1, "adaptive_budget": -1}
"""Padding values of a step's tensors; 0 for the others. Rows of padding belong to no sequence: ``cu_tokens`` ends before
them."""


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """Sizes of a step: tokens N, rows that need logits R, sequences B, pages of the longest sequence in one layer T."""

    n_tokens: int
    n_rows: int
    n_sequences: int
    table_width: int

    def __post_init__(self) -> None:
        if min(self.axes.values()) < 1:
            raise UsageError("a step has tokens, rows, sequences and pages", got=self.axes, expected="at least 1 of each")

    @classmethod
    def largest(cls, profiles: Sequence[Mapping[str, Sequence[int]]]) -> Self:
        """The sizes that cover every step that fits one of ``profiles`` (axis to smallest, usual and largest size)."""
        n_tokens, n_rows, n_sequences, width = (max(ranges[axis][-1] for ranges in profiles) for axis in "NRBT")
        return cls(n_tokens=n_tokens, n_rows=n_rows, n_sequences=n_sequences, table_width=width)

    @classmethod
    def of(cls, step: Step, page_size: int) -> Self:
        """The sizes of ``step``, without unused columns of its page table."""
        return cls(
            n_tokens=len(step.input_ids),
            n_rows=len(step.logit_rows),
            n_sequences=len(step.cu_tokens) - 1,
            table_width=max(1, -(-int(step.kv_len.max()) // page_size)),
        )

    @property
    def axes(self) -> dict[str, int]:
        """The sizes by the axis names of op specs."""
        return {"N": self.n_tokens, "R": self.n_rows, "B": self.n_sequences, "T": self.table_width}

    def with_tokens(self, n_tokens: int) -> "StepSizes":
        """The same sizes with another number of tokens."""
        return dataclasses.replace(self, n_tokens=n_tokens)

    def check_within(self, largest: "StepSizes") -> None:
        """``CapacityError`` if an axis is longer than in ``largest``."""
        if any(self.axes[axis] > largest.axes[axis] for axis in self.axes):
            raise CapacityError(
                "the step is larger than what memory was planned for",
                got=self.axes,
                expected=f"at most {largest.axes}",
                fix="send less at once, or plan for larger steps",
            )

    def bucket(self, largest: "StepSizes", *, one_token_each: bool, fixed: bool = False) -> "StepSizes":
        """These sizes rounded up, so that many steps share them: the table's width to a power of 2, with ``one_token_each`` the
        number of sequences too; at most ``largest``. ``fixed``: steps of one token each always have the largest sizes.
        """
        if one_token_each and fixed:
            n = min(largest.n_sequences, largest.n_tokens, largest.n_rows)
            return StepSizes(n_tokens=n, n_rows=n, n_sequences=n, table_width=largest.table_width)
        width = min(_power_of_2(self.table_width), largest.table_width)
        if not one_token_each:
            return dataclasses.replace(self, table_width=width)
        n = min(_power_of_2(self.n_sequences), largest.n_sequences, largest.n_tokens, largest.n_rows)
        return StepSizes(n_tokens=n, n_rows=n, n_sequences=n, table_width=width)


class StepBuffers:
    """One buffer on the device, and one on the host from which it is filled.

    The tensors of steps of equal sizes always have the same addresses, so that a captured step can be replayed on other values.
    """

    def __init__(
        self, tensors: Mapping[str, TensorSpec], largest: StepSizes, *, n_layers: int, spare_slot: int, device: torch.device
    ) -> None:
        """``tensors``: inputs of a step, by the names of ``Step``. ``spare_slot``: the slot that tokens of padding write to."""
        self._tensors = dict(tensors)
        self._n_layers = n_layers
        self._fills = {name: spare_slot if name == "slots" else _PADDING.get(name, 0) for name in tensors}
        n_elements = self._layout(largest)[1]
        self._host = torch.empty(n_elements, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._device = torch.empty(n_elements, dtype=torch.int64, device=device)

    def views(self, sizes: StepSizes) -> dict[str, Tensor]:
        """The tensors on the device, by name."""
        return self._views(self._device, sizes)

    def fill(self, step: Step | None, sizes: StepSizes) -> None:
        """Copy ``step``, padded to ``sizes``, to the device; None: all padding. Does not wait for the copy: ``fill`` must not
        be called again before the device has done the step.
        """
        arrays = {name: view.numpy() for name, view in self._views(self._host, sizes).items()}
        for name, array in arrays.items():
            array[...] = self._fills[name]
            if step is not None:
                _put(array, getattr(step, name), repeat_last=name == "cu_tokens")
        n_elements = self._layout(sizes)[1]
        self._device[:n_elements].copy_(self._host[:n_elements], non_blocking=True)

    def _views(self, buffer: Tensor, sizes: StepSizes) -> dict[str, Tensor]:
        return {
            name: buffer[start : start + math.prod(shape)].view(shape)
            for name, (start, shape) in self._layout(sizes)[0].items()
        }

    def _layout(self, sizes: StepSizes) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
        """Offset and shape of each tensor, and the total number of elements."""
        axes = sizes.axes | {"L": self._n_layers, "B+1": sizes.n_sequences + 1}
        places = {}
        end = 0
        for name, tensor in self._tensors.items():
            shape = tuple(axes[axis] for axis in tensor.axes)
            places[name] = (end, shape)
            end += -(-math.prod(shape) // _ALIGNMENT) * _ALIGNMENT
        return places, end


def _put(array: Ints, values: Ints, *, repeat_last: bool) -> None:
    """Write ``values`` to the beginning of ``array`` along every axis. Columns beyond the end of ``array`` are dropped; they
    are unused. ``repeat_last``: fill the rest with the last value.
    """
    if repeat_last:
        array[...] = values[-1]
    place = tuple(slice(min(n, size)) for n, size in zip(values.shape, array.shape, strict=True))
    array[place] = values[place]


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()
