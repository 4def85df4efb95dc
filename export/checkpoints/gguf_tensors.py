"""Which rows of a GGUF file's tensors are the decoder's weights, and their values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.base import QuantizedBlocks
from trt_kv.export.checkpoints.gguf_families import LAYER_NAMES, MODEL_NAMES, GgufFamily
from trt_kv.export.checkpoints.gguf_header import GgufTensor
from trt_kv.export.checkpoints.gguf_metadata import ModelFacts
from trt_kv.export.checkpoints.gguf_rope import DIVISORS, LONG, SHORT
from trt_kv.export.checkpoints.tensor_matching import some
from trt_kv.model_config import ModelConfig
from trt_kv.require import require
from trt_kv.weight_sources import stored_shapes, weight_sources

_NUMBERS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NOT_WEIGHTS = (DIVISORS, LONG, SHORT)
_CHUNK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """A weight of ``shape``: rows of ``tensor`` from ``first_row`` on.

    ``n_interleaved``: heads whose rows are stored in pairs that rotate together; 0: the rows are in Hugging Face's order.
    """

    tensor: GgufTensor
    shape: tuple[int, ...]
    first_row: int = 0
    n_interleaved: int = 0

    @property
    def n_rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

    @property
    def scheme(self) -> str | None:
        """ggml's name of the quantisation, such as "q4_1"; None if the weight is stored as numbers."""
        return None if self.tensor.scheme in _NUMBERS else self.tensor.scheme.lower()

    def chunks(self) -> Iterator[bytes]:
        """The bytes as they are stored, some rows at a time."""
        for row in range(0, self.n_rows, _CHUNK_ROWS):
            yield self.tensor.read(self.first_row + row, min(_CHUNK_ROWS, self.n_rows - row)).tobytes()

    def values(self) -> torch.Tensor:
        """The weight on the CPU, in its own memory."""
        stored = self._read()
        if self.tensor.scheme in _NUMBERS:
            return torch.from_numpy(stored.reshape(-1)).view(_NUMBERS[self.tensor.scheme]).reshape(self.shape)
        gguf = require("gguf", extra="gguf")
        values = gguf.dequantize(stored, gguf.GGMLQuantizationType[self.tensor.scheme])
        return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).reshape(self.shape)

    def blocks(self) -> QuantizedBlocks | None:
        """The blocks as they are stored; None if the weight is stored as numbers."""
        if self.scheme is None:
            return None
        blocks = self._read().reshape(self.n_rows, -1, self.tensor.block_bytes)
        return QuantizedBlocks(scheme=self.scheme, blocks=blocks, shape=self.shape)

    def _read(self) -> np.ndarray:
        """The bytes, uint8 ``[rows, row_bytes]``, rows in Hugging Face's order."""
        if not self.n_interleaved:
            return self.tensor.read(self.first_row, self.n_rows)
        if len(self.shape) == 1:  # a bias: one row of numbers, each of which belongs to a row of the matrix
            items = self.tensor.read().reshape(self.shape[0], -1)
            return np.ascontiguousarray(_halves_of_pairs(items, self.n_interleaved)).reshape(1, -1)
        return np.ascontiguousarray(_halves_of_pairs(self.tensor.read(self.first_row, self.n_rows), self.n_interleaved))


def _halves_of_pairs(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Rows ``[heads * size, ...]`` of which 2i and 2i + 1 of a head rotate together, ordered so that i and i + size / 2 do."""
    pairs = rows.reshape(n_heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def stored_rows(
    facts: ModelFacts, family: GgufFamily, config: ModelConfig, tensors: Mapping[str, GgufTensor]
) -> dict[str, StoredRows]:
    """The decoder's weights, in its order. Raises ``CheckpointError`` for what is missing, left over, or of another shape or
    a type that cannot be read.
    """
    sources, shapes, stored = weight_sources(config), config.tensor_shapes(), stored_shapes(config)
    names = {source.name: _stored_name(source.name, family) for source in sources.values()}
    missing = [name for name in names.values() if name not in tensors]
    extra = [name for name in tensors if name not in names.values() and name not in _NOT_WEIGHTS]
    if missing or extra:
        raise CheckpointError(
            f"the weights in {facts.path} are not those that its metadata describe",
            got=f"missing {some(missing)}; left over {some(extra)}",
            expected=f"the tensors of a {config.architecture} model of {config.n_layers} layers",
            fix="download it again, or take another conversion of the model",
        )
    for source, name in names.items():
        _check(tensors[name], stored[source], facts)
    heads = {"self_attn.q_proj": config.n_heads, "self_attn.k_proj": config.n_kv_heads} if family.interleaved else {}
    return {
        name: StoredRows(
            tensor=tensors[names[source.name]],
            shape=shapes[name],
            first_row=source.first_row,
            n_interleaved=heads.get(_split(name)[1], 0),
        )
        for name, source in sources.items()
    }


def _stored_name(name: str, family: GgufFamily) -> str:
    """The tensor that is Hugging Face's ``name``."""
    block, part, suffix = _split(name)
    if not block:
        return MODEL_NAMES.get(part, part) + suffix
    return block + {**LAYER_NAMES, **family.norms}.get(part, part) + suffix


def _split(name: str) -> tuple[str, str, str]:
    """E.g. ``blk.3.``, ``mlp.up_proj``, ``.weight``; no block outside the layers."""
    part, dot, suffix = name.rpartition(".")
    words = part.split(".")
    if words[:2] != ["model", "layers"]:
        return "", part, dot + suffix
    return f"blk.{words[2]}.", ".".join(words[3:]), dot + suffix


def _check(tensor: GgufTensor, shape: tuple[int, ...], facts: ModelFacts) -> None:
    if tensor.shape != shape:
        raise CheckpointError(
            f"tensor {tensor.name!r} of {facts.path} does not have the shape that its metadata imply",
            got=list(tensor.shape),
            expected=list(shape),
            fix="download it again, or take another conversion of the model",
        )
    if not _is_readable(tensor.scheme):
        raise CheckpointError(
            f"tensor {tensor.name!r} of {facts.path} has a quantisation that the gguf package cannot dequantise",
            got=tensor.scheme,
            expected="one that it can, such as Q4_0, Q4_1, Q8_0, Q4_K, Q6_K",
            fix="take another quantisation of the model, or a newer gguf package",
        )


@lru_cache
def _is_readable(scheme: str) -> bool:
    """Whether the gguf package can dequantise ``scheme``: tried on one block."""
    gguf = require("gguf", extra="gguf")
    if scheme in _NUMBERS:
        return True
    kind = gguf.GGMLQuantizationType[scheme]
    try:
        gguf.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True
