"""Matrices in blocks of small integers, as ``weights.data`` has them, for kernels that read them where they are.

Shapes: N rows of the matrix (columns of a product), K values of a row, M blocks of a row, S values of a block (K = M * S).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trt_kv.errors import EngineError
from trt_kv.plugins.paging import Floats, Ints

BITS = (4, 8)
BLOCK_SIZES = (16, 32, 64, 128)
BLOCKS, SCALES, ZERO_POINTS, OFFSETS, BIAS, N_COLUMNS, N_BLOCKS, BLOCK_SIZE, N_BITS, FIELDS = range(10)
"""The fields of a row of ``weight_table``: addresses of arrays, 0 for one that there is not, and sizes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedWeights:
    """A matrix [N, K] of the values ``scales * (q - zero point) + offsets``, one of each per block, and a bias.

    ``blocks``: the q, uint8 [N, M, S * bits / 8], of 4 bits the earlier value in the low half. ``scales`` and ``offsets``: fp32
    [N, M]. ``zero_points``: uint8 [N, ceil(M * bits / 8)], packed like the q. ``bias``: fp32 [N], added to products. Of size 0
    if there is none: zero points ``2 ** (bits - 1)``, offsets and bias 0. They may be memory maps, read-only ones too.
    """

    bits: int
    blocks: NDArray[np.uint8]
    scales: Floats
    zero_points: NDArray[np.uint8] = field(default_factory=lambda: np.zeros((0, 0), np.uint8))
    offsets: Floats = field(default_factory=lambda: np.zeros((0, 0), np.float32))
    bias: Floats = field(default_factory=lambda: np.zeros(0, np.float32))

    def __post_init__(self) -> None:
        """Compiled code trusts the shapes: what does not fit is an ``EngineError``."""
        _expect("the bits of packed weights", self.bits, BITS)
        _expect("the axes of packed blocks", self.blocks.ndim, (3,))
        _expect("the size of packed blocks", self.block_size, BLOCK_SIZES)
        n_columns, n_blocks = self.blocks.shape[:2]
        shapes = {
            "blocks": (n_columns, max(n_blocks, 1), self.block_size * self.bits // 8),
            "scales": (n_columns, n_blocks),
            "zero_points": (n_columns, -(-n_blocks * self.bits // 8)),
            "offsets": (n_columns, n_blocks),
            "bias": (n_columns,),
        }
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.size or name in ("blocks", "scales"):
                dtype = np.uint8 if name in ("blocks", "zero_points") else np.float32
                found = (array.shape, array.dtype, array.flags.c_contiguous and array.flags.aligned)
                _expect(f"the shape, type and layout of packed {name}", found, ((shape, np.dtype(dtype), True),))

    @property
    def block_size(self) -> int:
        return int(self.blocks.shape[2]) * 8 // self.bits

    @property
    def n_columns(self) -> int:
        """Of a product with it: N."""
        return len(self.blocks)

    @property
    def n_inputs(self) -> int:
        """K."""
        return int(self.blocks.shape[1]) * self.block_size


def weight_table(matrices: Sequence[PackedWeights]) -> Ints:
    """Addresses and sizes for kernels, int64 [matrices, ``FIELDS``]. The matrices must live as long as it is used.

    One type for all matrices, whatever their format and number, so that kernels are compiled once.
    """
    table = np.zeros((len(matrices), FIELDS), np.int64)
    for row, matrix in zip(table, matrices, strict=True):
        parts = (matrix.blocks, matrix.scales, matrix.zero_points, matrix.offsets, matrix.bias)
        row[: len(parts)] = [part.ctypes.data if part.size else 0 for part in parts]
        row[len(parts) :] = (matrix.n_columns, matrix.blocks.shape[1], matrix.block_size, matrix.bits)
    return table


def _expect(what: str, got: object, expected: Sequence[object]) -> None:
    if got not in expected:
        raise EngineError(
            f"{what} do not fit",
            got=got,
            expected=" or ".join(map(str, expected)),
            fix="build the engine again, with --force (make: FORCE=1)",
        )
