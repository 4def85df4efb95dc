"""The decoder of a ``ModelConfig`` as segments of operations: what ``trt_kv.decoder`` computes, in the same order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trt_kv.model_config import ModelConfig
from trt_kv.runtime.backends.host.native.matrices import COLUMNS, Weights
from trt_kv.runtime.backends.host.native.ops import MOST_PRODUCTS, OPERANDS, Activation, Buffer, Op

ARENA, PORTS, ATTENDED, LOGITS = range(4)
"""Arrays that buffers are in: memory that all segments use again, q, k and v, what attention returned, and the logits."""


@dataclass(frozen=True, kw_only=True)
class DenseProgram:
    """``segments``: of each, operations ``[n, 1 + OPERANDS]``. ``buffers``: of each ``Buffer`` its array, its first column
    there, and its width. ``constants``: those of the weights, and numbers that operations need.
    """

    segments: Sequence[NDArray[np.int64]]
    buffers: NDArray[np.int64]
    constants: NDArray[np.float32]
    largest_input: int
    """Columns of the widest matrix."""

    def width_of(self, array: int) -> int:
        """Columns of all buffers in ``array``."""
        return int(self.buffers[self.buffers[:, 0] == array, 2].sum())


def dense_program(config: ModelConfig, weights: Weights) -> DenseProgram:
    """The segments of ``config``, whose weights are ``weights``."""
    build = _Builder(config, weights)
    segments = [build.first()]
    segments += [build.between(layer) for layer in range(1, config.n_layers)]
    segments.append(build.last())
    return DenseProgram(
        segments=segments,
        buffers=_buffers(config),
        constants=np.concatenate([weights.constants, np.array(build.numbers, np.float32)]),
        largest_input=int(weights.matrices[:, COLUMNS.index("n_columns")].max()),
    )


def _buffers(config: ModelConfig) -> NDArray[np.int64]:
    heads, kv_heads = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    widths = dict.fromkeys((Buffer.X, Buffer.TAKEN, Buffer.NORMED, Buffer.PROJECTED), config.hidden_size)
    widths |= dict.fromkeys((Buffer.GATE, Buffer.UP), config.intermediate_size)
    widths |= {Buffer.TAKEN_ATTENDED: heads}
    in_arrays = [
        (ARENA, widths),
        (PORTS, {Buffer.Q: heads, Buffer.K: kv_heads, Buffer.V: kv_heads}),
        (ATTENDED, {Buffer.ATTENDED: heads}),
        (LOGITS, {Buffer.LOGITS: config.vocab_size}),
    ]
    table = np.zeros((len(Buffer), 3), np.int64)
    for array, columns in in_arrays:
        first = 0
        for buffer, width in columns.items():
            table[buffer] = array, first, width
            first += width
    return table


class _Builder:
    """Appends operations to the segment that is being built."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self._config = config
        self._weights = weights
        self._n_constants = len(weights.constants)
        self._ops: list[list[int]] = []
        self._eps = 0
        self.numbers: list[float] = []
        self._eps = self._number(config.rms_norm_eps)

    def first(self) -> NDArray[np.int64]:
        """From tokens to the first layer's q, k and v."""
        self._add(Op.EMBED, self._weights.matrix_ids["model.embed_tokens.weight"], Buffer.X)
        if self._config.embedding_scale != 1.0:
            self._add(Op.SCALE, Buffer.X, self._number(self._config.embedding_scale))
        self._before_attention(0)
        return self._segment()

    def between(self, layer: int) -> NDArray[np.int64]:
        """From what layer - 1 attended to, to the q, k and v of ``layer``."""
        self._after_attention(layer - 1, Buffer.X, Buffer.ATTENDED)
        self._before_attention(layer)
        return self._segment()

    def last(self) -> NDArray[np.int64]:
        """From what the last layer attended to, to logits: of the rows that need them alone."""
        config = self._config
        self._add(Op.TAKE, Buffer.X, Buffer.TAKEN)
        self._add(Op.TAKE, Buffer.ATTENDED, Buffer.TAKEN_ATTENDED)
        self._after_attention(config.n_layers - 1, Buffer.TAKEN, Buffer.TAKEN_ATTENDED)
        self._normalize(Buffer.TAKEN, Buffer.NORMED, "model.norm", config.hidden_size)
        head = "model.embed_tokens" if config.tie_embeddings else "lm_head"
        self._multiply(Buffer.NORMED, {head: Buffer.LOGITS})
        if config.logit_scale != 1.0:
            self._add(Op.SCALE, Buffer.LOGITS, self._number(config.logit_scale))
        if config.logit_soft_cap:
            self._add(Op.CAP, Buffer.LOGITS, self._number(config.logit_soft_cap))
        return self._segment()

    def _before_attention(self, layer: int) -> None:
        config, prefix = self._config, f"model.layers.{layer}."
        source = Buffer.X
        if config.norms != "post":
            source = self._normalize(source, Buffer.NORMED, f"{prefix}input_layernorm", config.hidden_size)
        out = {"q": Buffer.Q, "k": Buffer.K, "v": Buffer.V}
        self._multiply(source, {f"{prefix}self_attn.{name}_proj": buffer for name, buffer in out.items()})
        for name, n_heads in (("q", config.n_heads), ("k", config.n_kv_heads)):
            if config.qk_norm:
                width = config.head_dim if config.qk_norm_over == "head" else n_heads * config.head_dim
                self._normalize(out[name], out[name], f"{prefix}self_attn.{name}_norm", width)
            if layer not in config.unrotated_layers:
                self._add(Op.ROTATE, out[name], n_heads, int(layer in config.local_rope_layers))

    def _after_attention(self, layer: int, x: Buffer, attended: Buffer) -> None:
        config, prefix = self._config, f"model.layers.{layer}."
        factor = self._number(config.residual_scale)
        norms_results = config.norms != "pre"
        self._multiply(attended, {f"{prefix}self_attn.o_proj": Buffer.PROJECTED})
        if norms_results:
            self._normalize(Buffer.PROJECTED, Buffer.PROJECTED, f"{prefix}post_attention_layernorm", config.hidden_size)
        self._add(Op.ADD, x, Buffer.PROJECTED, factor)
        source = x
        if config.norms != "post":
            name = "pre_feedforward_layernorm" if norms_results else "post_attention_layernorm"
            source = self._normalize(x, Buffer.NORMED, f"{prefix}{name}", config.hidden_size)
        self._multiply(source, {f"{prefix}mlp.gate_proj": Buffer.GATE, f"{prefix}mlp.up_proj": Buffer.UP})
        activation = Activation.SILU if config.activation == "silu" else Activation.GELU_TANH
        self._add(Op.GATE, Buffer.GATE, Buffer.UP, activation)
        self._multiply(Buffer.GATE, {f"{prefix}mlp.down_proj": Buffer.PROJECTED})
        if norms_results:
            self._normalize(Buffer.PROJECTED, Buffer.PROJECTED, f"{prefix}post_feedforward_layernorm", config.hidden_size)
        self._add(Op.ADD, x, Buffer.PROJECTED, factor)

    def _normalize(self, source: Buffer, out: Buffer, name: str, width: int) -> Buffer:
        self._add(Op.NORMALIZE, source, out, self._weights.places[f"{name}.weight"], self._eps, width)
        return out

    def _multiply(self, source: Buffer, products: dict[str, Buffer]) -> None:
        """``products``: of each matrix the buffer of its product. Those with equal blocks share the rounding of the source."""
        of_blocks: dict[int, list[tuple[int, Buffer]]] = {}
        for name, out in products.items():
            matrix = self._weights.matrix_ids[f"{name}.weight"]
            block_size = int(self._weights.matrices[matrix, COLUMNS.index("block_size")])
            if block_size:
                of_blocks.setdefault(block_size, []).append((matrix, out))
            else:
                self._add(Op.MULTIPLY_FP32, source, matrix, out)
        for block_size, together in of_blocks.items():
            assert len(together) <= MOST_PRODUCTS
            self._add(Op.ROUND, source, block_size)
            self._add(Op.MULTIPLY, source, len(together), *(number for product in together for number in product))

    def _number(self, value: float) -> int:
        """The place of a number among the constants."""
        if value not in self.numbers:
            self.numbers.append(value)
        return self._n_constants + self.numbers.index(value)

    def _add(self, op: Op, *operands: int) -> None:
        self._ops.append([op, *operands, *[-1] * (OPERANDS - len(operands))])

    def _segment(self) -> NDArray[np.int64]:
        segment, self._ops = np.array(self._ops, np.int64), []
        return segment
