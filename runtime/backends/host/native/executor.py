"""The dense layers of an engine with packed weights, run by kernels of our own. See ``DenseExecutor``."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numba
import numpy as np

from trt_kv.errors import EngineError, UsageError
from trt_kv.manifest import GRAPHS, INT8_ACTIVATIONS, Manifest
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.paging import Floats
from trt_kv.rope_config import RopeConfig
from trt_kv.rope_frequencies import rope_frequencies
from trt_kv.runtime.backends.base import Attend
from trt_kv.runtime.backends.host.native.interpreter import External, Model, Step, run_segment
from trt_kv.runtime.backends.host.native.matrices import UnsupportedWeights, Weights, open_weights
from trt_kv.runtime.backends.host.native.program import ARENA, PORTS, dense_program
from trt_kv.runtime.backends.step import Ints
from trt_kv.weight_index import load_weight_index

SMALLEST_BLOCK = 16


class NativeExecutor:
    """Runs a decoder from its config and its mapped weights, without the graphs. See ``DenseExecutor``.

    A row's results have the same bits in every step that it is part of. Memory for values between two operations is as large as
    the largest step needed so far.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._config = config
        self._program = program = dense_program(config, weights)
        self._model = Model(program.buffers, weights.matrices, weights.mapped, program.constants)
        self._ropes = [_Rope(rope, config.head_dim) for rope in (config.rope, config.local_rope) if rope is not None]
        self._memory = _memory(0, program.width_of(ARENA), program.largest_input)

    @property
    def description(self) -> str:
        return f"own kernels, numba {numba.__version__}, CPU"

    def run(self, input_ids: Ints, positions: Ints, logit_rows: Ints, attend: Attend) -> Floats:
        """See ``DenseExecutor.run``."""
        config, program, n = self._config, self._program, len(input_ids)
        step = self._step(input_ids, positions, logit_rows)
        nothing = np.zeros(0, np.float32)
        attended, logits = nothing, np.empty((len(logit_rows), config.vocab_size), np.float32)
        for layer, ops in enumerate(program.segments[:-1]):
            ports = np.empty(n * program.width_of(PORTS), np.float32)
            run_segment(ops, n, self._model, step, External(ports, attended, nothing))
            q, k, v = np.split(ports, self._ends(n))
            out = attend(layer, *(x.reshape(n, -1, config.head_dim) for x in (q, k, v)))
            attended = np.ascontiguousarray(out, np.float32).reshape(-1)
        run_segment(program.segments[-1], len(logit_rows), self._model, step, External(nothing, attended, logits.reshape(-1)))
        return logits

    def _ends(self, n_rows: int) -> tuple[int, int]:
        """Where q and k end in an array of q, k and v."""
        q_width, kv_width = (heads * self._config.head_dim for heads in (self._config.n_heads, self._config.n_kv_heads))
        return n_rows * q_width, n_rows * (q_width + kv_width)

    def _step(self, input_ids: Ints, positions: Ints, logit_rows: Ints) -> Step:
        rotations = np.stack([rope.rotation(positions) for rope in self._ropes])
        n_rows = max(len(input_ids), len(logit_rows))
        if n_rows * self._program.width_of(ARENA) > len(self._memory[0]):
            self._memory = _memory(n_rows, self._program.width_of(ARENA), self._program.largest_input)
        return Step(input_ids, logit_rows, rotations, *self._memory)


class _Rope:
    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self._frequencies = rope_frequencies(rope, head_dim, array=partial(np.array, dtype=np.float32))
        self._factor = np.float32(rope.attention_factor)

    def rotation(self, positions: Ints) -> Floats:
        """Cosines and sines of ``positions``: ``[2, N, pairs]``."""
        angles = positions.astype(np.float32)[:, None] * self._frequencies
        return np.stack([np.cos(angles), np.sin(angles)]) * self._factor


def _memory(n_rows: int, n_columns: int, largest_input: int) -> tuple[np.ndarray, np.ndarray, Floats, Floats]:
    """The last four fields of ``Step``."""
    n_blocks = n_rows * largest_input // SMALLEST_BLOCK
    return (
        np.empty(n_rows * n_columns, np.float32),
        np.empty(n_rows * largest_input, np.int8),
        np.empty(n_blocks, np.float32),
        np.empty(n_blocks, np.float32),
    )
