"""The decoder of a ``ModelConfig`` as segments of operations: what ``trt_kv.decoder`` computes, in the same order."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trt_kv.model_config import ModelConfig
from trt_kv.runtime.backends.host.native.ops import OPERANDS, Activation, Buffer, Op

EMBEDDING = "model.embed_tokens"


@dataclass(frozen=True, kw_only=True)
class DenseProgram:
    """``segments``: of each, operations ``[n, 1 + OPERANDS]``, which refer to ``matrices`` by their number, to weights among
    the constants, and behind those to ``numbers``.
    """

    segments: Sequence[NDArray[np.int64]]
    matrices: Sequence[str]
    numbers: Sequence[float]


def dense_program(config: ModelConfig, places: Mapping[str, int], n_constants: int) -> DenseProgram:
    """The segments of ``config``, with a weight at each of ``places`` of ``n_constants`` constants."""
    matrices = [name.removesuffix(".weight") for name, shape in config.tensor_shapes().items() if len(shape) == 2]
    build = _Builder(config, {name: number for number, name in enumerate(matrices)}, places, n_constants)
    layers = range(config.n_layers)
    segments = [build.first(), *map(build.between, layers[1:]), build.last()]
    return DenseProgram(segments=segments, matrices=matrices, numbers=build.numbers)


class _Builder:
    """Appends operations to the segment that is being built."""

    def __init__(self, config: ModelConfig, matrices: Mapping[str, int], places: Mapping[str, int], n_constants: int) -> None:
        self._config = config
        self._matrices, self._places, self._n_constants = matrices, places, n_constants
        self._ops: list[list[int]] = []
        self.numbers: list[float] = []

    def first(self) -> NDArray[np.int64]:
        """From tokens to the first layer's q, k and v."""
        self._add(Op.EMBED, self._matrices[EMBEDDING], Buffer.X)
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
        self._multiply(Buffer.NORMED, Buffer.LOGITS, EMBEDDING if config.tie_embeddings else "lm_head")
        if config.logit_scale != 1.0:
            self._add(Op.SCALE, Buffer.LOGITS, self._number(config.logit_scale))
        if config.logit_soft_cap:
            self._add(Op.CAP, Buffer.LOGITS, self._number(config.logit_soft_cap))
        return self._segment()

    def _before_attention(self, layer: int) -> None:
        config, of = self._config, f"model.layers.{layer}."
        source = Buffer.X
        if config.norms != "post":
            source = self._normalize(source, Buffer.NORMED, f"{of}input_layernorm", config.hidden_size)
        self._multiply(source, Buffer.QKV, *(f"{of}self_attn.{name}_proj" for name in "qkv"))
        turns = (Buffer.LOCAL_COS, Buffer.LOCAL_SIN) if layer in config.local_rope_layers else (Buffer.COS, Buffer.SIN)
        heads = (("q", Buffer.Q_PART, Buffer.Q, config.n_heads), ("k", Buffer.K_PART, Buffer.K, config.n_kv_heads))
        for name, part, out, n_heads in heads:
            if config.qk_norm:
                width = config.head_dim if config.qk_norm_over == "head" else n_heads * config.head_dim
                self._normalize(part, part, f"{of}self_attn.{name}_norm", width)
            if layer in config.unrotated_layers:
                self._add(Op.COPY, part, out)
            else:
                self._add(Op.ROTATE, part, out, config.head_dim, *turns)
        self._add(Op.COPY, Buffer.V_PART, Buffer.V)

    def _after_attention(self, layer: int, x: Buffer, attended: Buffer) -> None:
        config, of = self._config, f"model.layers.{layer}."
        factor = self._number(config.residual_scale)
        norms_results = config.norms != "pre"
        self._multiply(attended, Buffer.PROJECTED, f"{of}self_attn.o_proj")
        if norms_results:
            self._normalize(Buffer.PROJECTED, Buffer.PROJECTED, f"{of}post_attention_layernorm", config.hidden_size)
        self._add(Op.ADD, x, Buffer.PROJECTED, factor)
        source = x
        if config.norms != "post":
            name = "pre_feedforward_layernorm" if norms_results else "post_attention_layernorm"
            source = self._normalize(x, Buffer.NORMED, f"{of}{name}", config.hidden_size)
        self._multiply(source, Buffer.GATE_UP, f"{of}mlp.gate_proj", f"{of}mlp.up_proj")
        self._add(Op.GATE, Buffer.GATE, Buffer.UP, Activation.SILU if config.activation == "silu" else Activation.GELU_TANH)
        self._multiply(Buffer.GATE, Buffer.PROJECTED, f"{of}mlp.down_proj")
        if norms_results:
            self._normalize(Buffer.PROJECTED, Buffer.PROJECTED, f"{of}post_feedforward_layernorm", config.hidden_size)
        self._add(Op.ADD, x, Buffer.PROJECTED, factor)

    def _normalize(self, source: Buffer, out: Buffer, name: str, width: int) -> Buffer:
        eps = self._number(self._config.rms_norm_eps)
        self._add(Op.NORMALIZE, source, out, self._places[f"{name}.weight"], eps, width)
        return out

    def _multiply(self, source: Buffer, out: Buffer, *names: str) -> None:
        """Products of ``source`` with matrices that follow one another."""
        first = self._matrices[names[0]]
        assert [self._matrices[name] for name in names] == list(range(first, first + len(names)))
        self._add(Op.ROUND, source)
        self._add(Op.MULTIPLY, first, len(names), out)

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
