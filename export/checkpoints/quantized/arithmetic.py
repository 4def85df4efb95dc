"""What all schemes have in common: integers or narrow floats ("codes"), a scale and a zero point for each of their blocks.

``weight = (code - zero) * scale``, computed in fp32.
"""

import torch
from torch import Tensor

from trt_kv.errors import CheckpointError

_ROWS = 1024
"""Rows of a weight that are expanded at once, which bounds the memory besides the result."""


def dequantized(codes_OI: Tensor, scale_RC: Tensor, zero_RC: Tensor | None, row_of_O: Tensor, column_of_I: Tensor) -> Tensor:
    """Weight [O, I] fp32 of ``codes_OI``. Output o and input i have the scale and zero point ``[row_of_O[o], column_of_I[i]]``,
    both int64. Zero points None: 0. ``CheckpointError`` for scales that are no finite numbers.
    """
    weight_OI = torch.empty(codes_OI.shape, dtype=torch.float32)
    scale_RC = scale_RC.float()
    if not scale_RC.isfinite().all():
        raise CheckpointError(
            "a quantised weight has scales that are no finite numbers",
            got=f"{int((~scale_RC.isfinite()).sum())} of {scale_RC.numel()}",
            fix="download the checkpoint again",
        )
    for start in range(0, len(codes_OI), _ROWS):
        rows = row_of_O[start : start + _ROWS]
        values = codes_OI[start : start + _ROWS].float()
        if zero_RC is not None:
            values -= zero_RC[rows].float()[:, column_of_I]
        torch.mul(values, scale_RC[rows][:, column_of_I], out=weight_OI[start : start + _ROWS])
    return weight_OI


def unpacked(packed_RW: Tensor, n_bits: int, n_columns: int) -> Tensor:
    """Unsigned integers [R, n_columns] uint8 of ``n_bits`` each (1, 2, 4 or 8), packed into int32 [R, W] from the lowest bits
    up.
    """
    shifts = torch.arange(0, 32, n_bits, dtype=torch.int32)
    mask = (1 << n_bits) - 1
    values = torch.empty((*packed_RW.shape, len(shifts)), dtype=torch.uint8)
    for at, shift in enumerate(shifts):
        values[..., at] = ((packed_RW >> shift) & mask).to(torch.uint8)
    return values.reshape(len(packed_RW), -1)[:, :n_columns]


def block_indices(n: int, n_blocks: int, block: int | None) -> Tensor | None:
    """For each of ``n`` rows or columns the block [n] int64 that it is in: one block for all, one for each, or ``block`` of
    them in a block. None if there should be another number of blocks.
    """
    if n_blocks == 1:
        return torch.zeros(n, dtype=torch.int64)
    if block is not None and n_blocks == -(-n // block):
        return torch.arange(n) // block
    return torch.arange(n) if n_blocks == n and block is None else None
