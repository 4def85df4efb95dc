"""Where the buffers of a step are in memory."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from trt_kv.model_config import ModelConfig
from trt_kv.runtime.backends.host.native.ops import Array, Buffer

ITEM_BYTES = 4
ARRAY, BEGIN, ROW_BYTES, WIDTH = range(4)
"""Columns of a frame."""


class Layout:
    """Of buffers in arrays. In an array there are columns one after the other, all rows of the first before those of the next;
    parts of a buffer are some of its columns.
    """

    def __init__(self, config: ModelConfig, n_pairs: Sequence[int]) -> None:
        """``n_pairs``: of the channels that each RoPE turns."""
        self._rows: dict[Buffer, tuple[int, int, int, int, int]] = {}
        self.widths = dict.fromkeys(Array, 0)
        """Columns of all buffers of an array."""
        hidden, q_width, kv_width = config.hidden_size, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        for buffer in (Buffer.X, Buffer.NORMED, Buffer.PROJECTED, Buffer.TAKEN):
            self._put(Array.ARENA, buffer, hidden)
        self._put(Array.ARENA, Buffer.TAKEN_ATTENDED, q_width)
        qkv = {Buffer.Q_PART: q_width, Buffer.K_PART: kv_width, Buffer.V_PART: kv_width}
        self._put(Array.ARENA, Buffer.QKV, sum(qkv.values()), qkv)
        gate_up = dict.fromkeys((Buffer.GATE, Buffer.UP), config.intermediate_size)
        self._put(Array.ARENA, Buffer.GATE_UP, sum(gate_up.values()), gate_up)
        for buffer, width in ((Buffer.Q, q_width), (Buffer.K, kv_width), (Buffer.V, kv_width)):
            self._put(Array.PORTS, buffer, width)
        self._put(Array.ATTENDED, Buffer.ATTENDED, q_width)
        self._put(Array.LOGITS, Buffer.LOGITS, config.vocab_size)
        rotations = zip(((Buffer.COS, Buffer.SIN), (Buffer.LOCAL_COS, Buffer.LOCAL_SIN)), n_pairs, strict=False)
        for buffer, width in [(buffer, width) for pair, width in rotations for buffer in pair]:
            self._put(Array.ROTATIONS, buffer, width)
        self._table = np.array([self._rows.get(buffer, (Array.ROTATIONS, 0, 0, 0, 0)) for buffer in Buffer], np.int64)

    def frame(self, n_rows: Mapping[Array, int]) -> NDArray[np.int64]:
        """``[buffers, 4]``: of each buffer its array, where it begins there, the distance of its rows, both in bytes, and its
        width, if arrays have so many rows.
        """
        arrays, first, joint, column, width = self._table.T
        rows = np.array([n_rows[array] for array in Array], np.int64)
        return np.stack([arrays, ITEM_BYTES * (first * rows[arrays] + column), ITEM_BYTES * joint, width], axis=1)

    def _put(self, array: Array, buffer: Buffer, width: int, parts: Mapping[Buffer, int] | None = None) -> None:
        first, column = self.widths[array], 0
        self._rows[buffer] = array, first, width, 0, width
        for part, part_width in (parts or {}).items():
            self._rows[part] = array, first, width, column, part_width
            column += part_width
        self.widths[array] += width
