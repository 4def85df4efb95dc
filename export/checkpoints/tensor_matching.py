"""Which of a folder's tensors are the decoder's weights, and which others are harmless."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.quantized.tensors import QuantizedTensor
from trt_kv.export.checkpoints.safetensors_file import WEIGHT_DTYPES, StoredTensor
from trt_kv.model_config import ModelConfig
from trt_kv.require import require
from trt_kv.weight_sources import stored_shapes

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

_BASE_PREFIX = "model."
_WRAPPERS = {"language_model.": "", "model.language_model.": "model."}
"""What names of a wrapped text model begin with, in older and newer versions of transformers, and what without the wrapper."""
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.\w+|(self_)?attn\.(masked_)?bias|masked_bias)")
"""RoPE tables and causal masks that older versions of transformers saved; both are computed from the config."""
_ROWS = 4096
_N_SHOWN = 4


def matched(folder: Path, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that hold the decoder's weights, in its order; an error if one is missing, unexpected or of another shape."""
    shapes = stored_shapes(config)
    stored = _with_base_prefix(_unwrapped(stored))
    missing = [name for name in shapes if name not in stored]
    extra = [name for name in stored if name not in shapes and not _is_redundant(folder, config, stored, name)]
    if missing or extra:
        raise CheckpointError(
            f"the weights in {folder} are not those that config.json describes",
            got=f"missing {some(missing)}; left over {some(extra)}",
            expected=f"the {len(shapes)} tensors of a {config.architecture} model of {config.n_layers} layers",
            fix=_fix(missing, extra),
        )
    for name, shape in shapes.items():
        _check_tensor(name, stored[name], shape)
    return {name: stored[name] for name in shapes}


def some(names: list[str]) -> str:
    """A short list for an error message."""
    if not names:
        return "nothing"
    more = f" and {len(names) - _N_SHOWN} more" if len(names) > _N_SHOWN else ""
    return ", ".join(names[:_N_SHOWN]) + more


def _unwrapped(stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """Tensors of a text model that was saved inside its wrapper for images and text, without a vision tower."""
    for prefix, instead in _WRAPPERS.items():
        if prefix + EMBEDDING.removeprefix(instead) in stored:
            return {
                instead + name.removeprefix(prefix) if name.startswith(prefix) else name: tensor
                for name, tensor in stored.items()
            }
    return stored


def _with_base_prefix(stored: Mapping[str, StoredTensor]) -> Mapping[str, StoredTensor]:
    """Tensors of a model that was saved without its head lack the prefix of the names; transformers adds it likewise."""
    if EMBEDDING in stored or EMBEDDING.removeprefix(_BASE_PREFIX) not in stored:
        return stored
    return {name if name == OUTPUT else _BASE_PREFIX + name: tensor for name, tensor in stored.items()}


def _fix(missing: list[str], extra: list[str]) -> str:
    prefix = _common_prefix(missing, extra)
    if prefix:
        return (
            f"the names begin with {prefix!r}, as of a model that was saved inside a wrapper: save the model itself, with "
            "save_pretrained() of the unwrapped model (for an adapter, after merge_and_unload())"
        )
    if missing == [OUTPUT]:
        return 'if the model ties its embeddings, set "tie_word_embeddings": true in config.json; else save it with its head'
    return "take config.json and the weights from the same checkpoint"


def _common_prefix(missing: Iterable[str], extra: Iterable[str]) -> str:
    """What stands before a missing name in a left over one, such as ``module.``."""
    return next((other.removesuffix(name) for name in missing for other in extra if other.endswith(f".{name}")), "")


def _check_tensor(name: str, tensor: StoredTensor, shape: tuple[int, ...]) -> None:
    if tensor.dtype not in WEIGHT_DTYPES:
        raise CheckpointError(
            f"tensor {name!r} in {tensor.path} has a dtype that trt-kv does not support",
            got=tensor.dtype,
            expected="one of " + ", ".join(WEIGHT_DTYPES),
            fix="pass the original, unquantised checkpoint",
        )
    if tensor.shape != shape:
        raise CheckpointError(
            f"tensor {name!r} in {tensor.path} does not have the shape that config.json implies",
            got=list(tensor.shape),
            expected=list(shape),
            fix="take config.json and the weights from the same checkpoint",
        )


def _is_redundant(folder: Path, config: ModelConfig, stored: Mapping[str, StoredTensor], name: str) -> bool:
    """Whether a tensor that the decoder does not use is harmless: a buffer, or a copy of the tied embedding."""
    if name == OUTPUT and config.tie_embeddings and EMBEDDING in stored:
        difference = _difference(stored[OUTPUT], stored[EMBEDDING])
        if difference is None:
            return True
        raise CheckpointError(
            f"{folder} ties its embeddings, but also has another output matrix",
            got=f"tie_word_embeddings true, and {OUTPUT} with {difference} than {EMBEDDING}",
            expected="the two to have equal values, or tie_word_embeddings false",
            fix="take config.json and the weights from the same checkpoint; if the model was trained with both, set "
            '"tie_word_embeddings": false',
        )
    return _BUFFERS.fullmatch(name) is not None


def _difference(one: StoredTensor, other: StoredTensor) -> str | None:
    """How two matrices differ; None if their values are equal in the narrower of their types."""
    if one.shape != other.shape:
        return f"another shape ({list(one.shape)}, not {list(other.shape)})"
    if not {one.dtype, other.dtype} <= set(WEIGHT_DTYPES):
        return f"another type ({one.dtype}, not {other.dtype})"
    if isinstance(one, QuantizedTensor) or isinstance(other, QuantizedTensor):
        return None if torch.equal(one.read().float(), other.read().float()) else "other values"
    safetensors = require("safetensors")
    with safetensors.safe_open(one.path, framework="pt") as a, safetensors.safe_open(other.path, framework="pt") as b:
        left, right = a.get_slice(one.name), b.get_slice(other.name)
        for row in range(0, one.shape[0], _ROWS):
            x, y = left[row : row + _ROWS], right[row : row + _ROWS]
            narrower = min(x.dtype, y.dtype, key=lambda dtype: (torch.finfo(dtype).bits, -torch.finfo(dtype).eps))
            if not torch.equal(x.to(narrower), y.to(narrower)):
                return "other values"
    return None
