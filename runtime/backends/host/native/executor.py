"""The dense layers of an engine with packed weights, run by kernels of our own. See ``DenseExecutor``."""

from functools import partial

import numba
import numpy as np

from trt_kv.errors import UsageError
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.kv_rows import KvDtype, store
from trt_kv.plugins.packed_products import RoundedRows, rounded_rows
from trt_kv.plugins.packed_weights import weight_table
from trt_kv.plugins.paging import Floats
from trt_kv.rope_config import RopeConfig
from trt_kv.rope_frequencies import rope_frequencies
from trt_kv.runtime.backends.base import Attend
from trt_kv.runtime.backends.host.attention_layers import AttentionLayers, CachedTokens
from trt_kv.runtime.backends.host.native.decode_step import SegmentArguments, run_decode_step
from trt_kv.runtime.backends.host.native.interpreter import run_segment
from trt_kv.runtime.backends.host.native.layout import Layout
from trt_kv.runtime.backends.host.native.ops import Array
from trt_kv.runtime.backends.host.native.program import dense_program
from trt_kv.runtime.backends.host.native.weights import Weights
from trt_kv.runtime.backends.step import Ints


class NativeExecutor:
    """Runs a decoder from its config and its mapped weights, without the graphs. See ``DenseExecutor``.

    A row's results have the same bits in every step that it is part of. Memory for values between two operations is as large as
    the largest step needed so far.
    """

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._config = config
        program = dense_program(config, weights.places, len(weights.constants))
        self._segments = program.segments
        self._all_ops, self._ends = np.concatenate(program.segments), np.cumsum([len(ops) for ops in program.segments])
        self._matrices = [weights.matrices[name] for name in program.matrices]
        self._table = weight_table(self._matrices)
        self._constants = np.concatenate([weights.constants, np.array(program.numbers, np.float32)])
        self._ropes = [_Rope(rope, config.head_dim) for rope in (config.rope, config.local_rope) if rope is not None]
        self._layout = Layout(config, [rope.n_pairs for rope in self._ropes])
        self._arena, self._rounded = self._memory(0)

    @property
    def description(self) -> str:
        return f"own kernels (numba {numba.__version__}), CPU"

    def warm_up(self, kv_dtype: str, layers: AttentionLayers | None) -> None:
        """Compile, or load from the cache, what a step runs, and ``decode`` with a cache of ``layers`` in ``kv_dtype``."""
        first = np.zeros(1, np.int64)
        self.run(first, first, first, lambda _layer, q, _k, _v: q)
        if layers is None:
            return
        config, n_layers = self._config, len(layers.scale_L)
        n_kv_heads = config.n_kv_heads * config.n_layers // n_layers
        kv = store(np.zeros((1, 2, n_kv_heads, 1, config.head_dim), np.float32), KvDtype(kv_dtype))
        positions = np.zeros((1, n_kv_heads, 1), np.int64)
        by_layer = np.zeros((n_layers, 1), np.int64)
        self.decode(first, first, layers, CachedTokens(first, by_layer, by_layer[..., None], by_layer + 1, kv, positions))

    def run(self, input_ids: Ints, positions: Ints, logit_rows: Ints, attend: Attend) -> Floats:
        """See ``DenseExecutor.run``."""
        config, n = self._config, len(input_ids)
        arguments = self._arguments(input_ids, positions, logit_rows)
        nothing = np.empty(0, np.float32)
        attended = nothing.reshape(0, 0, 0)
        n_ports = n * self._layout.widths[Array.PORTS]
        q_end, k_end = n * config.n_heads * config.head_dim, n * (config.n_heads + config.n_kv_heads) * config.head_dim
        shape = n, -1, config.head_dim
        for layer, ops in enumerate(self._segments[:-1]):
            ports = np.empty(n_ports, np.float32)
            run_segment(ops, n, *arguments, ports, attended)
            q, k, v = ports[:q_end].reshape(shape), ports[q_end:k_end].reshape(shape), ports[k_end:].reshape(shape)
            attended = np.ascontiguousarray(attend(layer, q, k, v), np.float32)
        run_segment(self._segments[-1], len(logit_rows), *arguments, nothing, attended)
        return arguments[-1]

    def decode(self, input_ids: Ints, logit_rows: Ints, layers: AttentionLayers, tokens: CachedTokens) -> Floats:
        """See ``WholeStepExecutor.decode``."""
        config = self._config
        assert len(layers.scale_L) == len(tokens.slots_LN)
        assert config.n_layers * config.n_kv_heads == len(tokens.slots_LN) * tokens.kv.shape[2]
        arguments = self._arguments(input_ids, tokens.positions_N, logit_rows)
        shape = config.n_heads, config.n_kv_heads, config.head_dim
        run_decode_step(self._all_ops, self._ends, len(logit_rows), shape, layers, tokens, arguments)
        return arguments[-1]

    def _arguments(self, input_ids: Ints, positions: Ints, logit_rows: Ints) -> SegmentArguments:
        """Checked and with memory for results: logits, which come last."""
        n, n_logits = len(input_ids), len(logit_rows)
        self._check(input_ids, logit_rows)
        input_ids, logit_rows = (np.ascontiguousarray(numbers, np.int64) for numbers in (input_ids, logit_rows))
        n_rows = dict.fromkeys(Array, n) | {Array.ARENA: max(n, n_logits), Array.LOGITS: n_logits}
        if len(self._rounded.values) < n_rows[Array.ARENA]:
            self._arena, self._rounded = self._memory(n_rows[Array.ARENA])
        rotations = np.concatenate([rope.rotation(positions) for rope in self._ropes])
        logits = np.empty((n_logits, self._config.vocab_size), np.float32)
        tables = (self._layout.frame(n_rows), self._constants, self._table, input_ids, logit_rows, self._rounded)
        return (*tables, self._arena, rotations, logits)

    def _check(self, input_ids: Ints, logit_rows: Ints) -> None:
        """Compiled code does not check what it reads."""
        for name, numbers, end in (
            ("a token", input_ids, self._config.vocab_size),
            ("a row that needs logits", logit_rows, len(input_ids)),
        ):
            if len(numbers) and not 0 <= numbers.min() <= numbers.max() < end:
                raise UsageError(f"{name} is out of range", got=numbers.tolist(), expected=f"numbers below {end}")

    def _memory(self, n_rows: int) -> tuple[Floats, RoundedRows]:
        n_inputs = max(matrix.n_inputs for matrix in self._matrices)
        return np.empty(n_rows * self._layout.widths[Array.ARENA], np.float32), rounded_rows(n_rows, n_inputs)


class _Rope:
    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self._frequencies = rope_frequencies(rope, head_dim, array=partial(np.array, dtype=np.float32))
        self._factor = np.float32(rope.attention_factor)

    @property
    def n_pairs(self) -> int:
        return len(self._frequencies)

    def rotation(self, positions: Ints) -> Floats:
        """Cosines ``[N, pairs]`` and then sines of ``positions``, flat."""
        angles = positions.astype(np.float32)[:, None] * self._frequencies
        return np.concatenate([np.cos(angles), np.sin(angles)]).reshape(-1) * self._factor
