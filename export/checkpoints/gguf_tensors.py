"""Which rows of a GGUF file's tensors are the decoder's weights, and their values."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.base import QuantizedBlocks
from trt_kv.export.checkpoints.gguf_families import FUSED, LAYER_NAMES, MODEL_NAMES, GgufFamily
from trt_kv.export.checkpoints.gguf_header import GgufTensor
from trt_kv.export.checkpoints.gguf_metadata import ModelFacts
from trt_kv.export.checkpoints.tensor_matching import some
from trt_kv.model_config import ModelConfig
from trt_kv.require import require

_NUMBERS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_NOT_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_CHUNK_ROWS = 4096


@dataclass(frozen=True, kw_only=True)
class StoredRows:
    """A weight of ``shape``: rows of ``tensor``, which is to be of ``stored_shape``, from ``first_row`` on.

    ``n_interleaved``: heads whose rows are stored in pairs that rotate together; 0: the rows are in Hugging Face's order.
    """

    tensor: GgufTensor
    shape: tuple[int, ...]
    stored_shape: tuple[int, ...]
    first_row: int = 0
    n_interleaved: int = 0

    @property
    def n_rows(self) -> int:
        return self.shape[0] if len(self.shape) > 1 else 1

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
        if self.tensor.scheme in _NUMBERS:
            return None
        blocks = self._read().reshape(self.n_rows, -1, self.tensor.block_bytes)
        return QuantizedBlocks(scheme=self.tensor.scheme.lower(), blocks=blocks, shape=self.shape)

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
    shapes = config.tensor_shapes()
    found = {name: _find(name, family, config, shapes, tensors) for name in shapes}
    missing = [_stored_name(name, family) for name, rows in found.items() if rows is None]
    used = {rows.tensor.name for rows in found.values() if rows is not None}
    extra = [name for name in tensors if name not in used and name not in _NOT_WEIGHTS]
    if missing or extra:
        raise CheckpointError(
            f"the weights in {facts.path} are not those that its metadata describe",
            got=f"missing {some(missing)}; left over {some(extra)}",
            expected=f"the tensors of a {config.architecture} model of {config.n_layers} layers",
            fix="download it again, or take another conversion of the model",
        )
    rows = {name: rows for name, rows in found.items() if rows is not None}
    for weight in rows.values():
        _check(weight, facts)
    return rows


def _find(
    name: str,
    family: GgufFamily,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, GgufTensor],
) -> StoredRows | None:
    prefix, part, suffix = _split(name)
    n_heads = {"self_attn.q_proj": config.n_heads, "self_attn.k_proj": config.n_kv_heads}.get(part, 0)
    shape, tensor = shapes[name], tensors.get(_stored_name(name, family))
    if tensor is None:
        return None
    if not family.fused or part not in FUSED:
        first_row, n_rows = 0, shape[0]
    else:
        parts = FUSED[part][1]
        heights = [shapes[f"{prefix}{other}{suffix}"][0] for other in parts]
        first_row, n_rows = sum(heights[: parts.index(part)]), sum(heights)
    return StoredRows(
        tensor=tensor,
        shape=shape,
        stored_shape=(n_rows, *shape[1:]),
        first_row=first_row,
        n_interleaved=n_heads if family.interleaved else 0,
    )


def _stored_name(name: str, family: GgufFamily) -> str:
    """The tensor in which the weight ``name`` is expected."""
    prefix, part, suffix = _split(name)
    if not prefix:
        return MODEL_NAMES.get(part, part) + suffix
    if family.fused and part in FUSED:
        return f"{_block(prefix)}{FUSED[part][0]}{suffix}"
    return _block(prefix) + {**LAYER_NAMES, **family.norms}.get(part, part) + suffix


def _split(name: str) -> tuple[str, str, str]:
    """E.g. ``model.layers.3.``, ``mlp.up_proj``, ``.weight``; no prefix outside the layers."""
    part, dot, suffix = name.rpartition(".")
    words = part.split(".")
    if words[:2] != ["model", "layers"]:
        return "", part, dot + suffix
    return ".".join(words[:3]) + ".", ".".join(words[3:]), dot + suffix


def _block(prefix: str) -> str:
    return f"blk.{prefix.split('.')[2]}."


def _check(weight: StoredRows, facts: ModelFacts) -> None:
    tensor = weight.tensor
    if tensor.shape != weight.stored_shape:
        raise CheckpointError(
            f"tensor {tensor.name!r} of {facts.path} does not have the shape that its metadata imply",
            got=list(tensor.shape),
            expected=list(weight.stored_shape),
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
