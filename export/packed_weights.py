"""Which of a checkpoint's weights are stored in blocks of integers, in which format, and their arrays."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import torch

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.base import Checkpoint
from trt_kv.export.gguf_packing import FORMATS, USUAL_BLOCK_SIZE, packed_blocks
from trt_kv.export.packing import PackedMatrix, block_format, packed
from trt_kv.manifest import INT8_ACTIVATIONS, Quantization
from trt_kv.weight_index import BlockFormat

TRACED_EXACTLY = 4096
"""Weights of at most this many elements are traced with their values: the exporter shares small tensors that are equal."""

ROWS = "rows"
"""The blocks of a matrix again, as rows of bytes: what GatherBlockQuantized reads."""
_COARSE = ("q2_k", "q3_k", "q4_k", "q4_0", "q4_1", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq3_xxs", "iq3_s", "iq4_nl")
"""Schemes of at most 4 bits and a half per value."""


def is_traced_exactly(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape is in the graphs themselves; the others are in ``weights.data``."""
    return math.prod(shape) <= TRACED_EXACTLY


def stored_name(name: str) -> str:
    """Under which name the array ``name`` of a graph is stored: rows of bytes are the blocks."""
    return f"{name.removesuffix(ROWS)}blocks" if name.endswith(f".{ROWS}") else name


class PackedWeights:
    """The matrices of ``checkpoint`` that are stored in blocks.

    A matrix that the checkpoint holds in blocks that can be taken as they are keeps them, however many bits ``quantization``
    asks for, unless it asks for another block size than the usual one: nothing is rounded twice. Another one that it holds in
    more than 4 bits and a half per value is rounded to 8 bits. All others are rounded as ``quantization`` says. Below accuracy
    level 4 matrices of 8 bits stay in fp32, because ONNX Runtime would make numbers of all their blocks in every step.
    """

    def __init__(self, checkpoint: Checkpoint, quantization: Quantization) -> None:
        self._checkpoint = checkpoint
        self.accuracy_level = quantization.accuracy_level
        self.formats: Mapping[str, BlockFormat] = {
            name: how
            for name, shape in checkpoint.config.tensor_shapes().items()
            if len(shape) == 2 and not is_traced_exactly(shape)
            for how in [_format(checkpoint, name, shape, quantization)]
            if how is not None
        }
        self._last: tuple[str, PackedMatrix] | None = None

    def keeps_blocks(self, name: str) -> bool:
        """Whether ``name`` has the blocks of the checkpoint."""
        return self.formats.get(name) == FORMATS.get(self._checkpoint.scheme(name) or "")

    def shapes(self, name: str) -> dict[str, tuple[int, ...]]:
        """The shapes of the arrays of ``name``: see ``BlockFormat.part_shapes``."""
        return self.formats[name].part_shapes(self._checkpoint.config.tensor_shapes()[name])

    def part(self, name: str, part: str) -> np.ndarray:
        """One array of ``name``. The arrays of the last matrix are kept, because they are asked for one after the other.

        Raises ``CheckpointError`` for values that are not finite, and if the checkpoint has changed.
        """
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self._matrix(name)
        return self._last[1].parts[part]

    def _matrix(self, name: str) -> PackedMatrix:
        if self.keeps_blocks(name):
            stored = self._checkpoint.quantized(name)
            assert stored is not None
            return packed_blocks(stored)
        values = self._checkpoint.tensor(name).to(torch.float32)
        if not bool(torch.isfinite(values.sum(dtype=torch.float64))):
            raise CheckpointError(
                f"{name} has values that cannot be quantised", got="NaN or infinity", expected="finite values", fix="QUANT=none"
            )
        return packed(values.numpy(), self.formats[name])


def _format(checkpoint: Checkpoint, name: str, shape: tuple[int, ...], quantization: Quantization) -> BlockFormat | None:
    scheme = checkpoint.scheme(name)
    how = block_format(shape[1], quantization)
    if scheme in FORMATS and quantization.block_size == USUAL_BLOCK_SIZE:
        how = FORMATS[scheme]
    elif how is not None and scheme is not None and scheme not in _COARSE:
        how = dataclasses.replace(how, bits=8)
    return None if how is not None and how.bits == 8 and quantization.accuracy_level < INT8_ACTIVATIONS else how
