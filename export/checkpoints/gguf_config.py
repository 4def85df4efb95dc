"""A GGUF file's metadata as Hugging Face's ``config.json``."""

import math
from typing import Any

import numpy as np

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.gguf_families import FAMILIES, Fields, GgufFamily
from trt_kv.export.checkpoints.gguf_header import GgufTensor
from trt_kv.export.checkpoints.gguf_metadata import ModelFacts

EMBEDDING, OUTPUT, ROPE_FACTORS = "token_embd.weight", "output.weight", "rope_freqs.weight"

_REQUIRED = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_THETA = 10000.0
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
_END_TEXTS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<end_of_utterance>",
)
"""Control tokens that end a text wherever they occur. A GGUF file names one end, or two; Hugging Face's generation settings,
which it does not hold, name all."""
CONTROL = 3
"""``tokenizer.ggml.token_type`` of a control token."""
_LLAMA3_HIGH = 4.0
_LLAMA3_POSITIONS = 8192
_SAME = 1e-4


def family_of(facts: ModelFacts) -> GgufFamily:
    """The family of the file's architecture. Raises ``CheckpointError`` for one that is not supported."""
    if facts.optional("expert_count"):
        raise CheckpointError(
            f"{facts.path} holds a mixture of experts, which trt-kv does not support",
            got=f"architecture {facts.architecture!r} with {facts.optional('expert_count')} experts",
            expected="a dense decoder",
        )
    if facts.architecture not in FAMILIES:
        raise CheckpointError(
            f"{facts.path} has an architecture that trt-kv does not read from GGUF",
            got=f"general.architecture {facts.architecture!r}",
            expected="one of " + ", ".join(FAMILIES),
        )
    return FAMILIES[facts.architecture]


def config_from_gguf(facts: ModelFacts, family: GgufFamily, tensors: dict[str, GgufTensor]) -> Fields:
    """The fields of ``config.json``. Raises ``CheckpointError`` for missing or contradictory metadata."""
    fields: Fields = {"model_type": family.model_type, "architectures": [family.class_name]}
    fields |= {name: facts.required(key) for key, name in _REQUIRED.items()}
    fields["num_key_value_heads"] = facts.optional("attention.head_count_kv") or fields["num_attention_heads"]
    fields |= _head_fields(facts, fields)
    fields["rope_theta"] = facts.optional("rope.freq_base") or _THETA
    fields["vocab_size"] = _vocab_size(facts, tensors)
    fields["tie_word_embeddings"] = OUTPUT not in tensors
    fields["hidden_act"] = "silu"
    fields["bos_token_id"] = facts.optional("tokenizer.ggml.bos_token_id", prefixed=False)
    fields["eos_token_id"] = list(end_tokens(facts))
    scaling = _rope_scaling(facts, fields, tensors)
    if scaling is not None:
        fields["rope_scaling"] = scaling
    _check_block_count(facts, tensors, fields["num_hidden_layers"])
    return {**fields, **family.settings(facts)}


def end_tokens(facts: ModelFacts) -> tuple[int, ...]:
    """The tokens that end a text: those that the metadata name, then control tokens with a well-known text."""
    named = [facts.optional(f"tokenizer.ggml.{key}", prefixed=False) for key in _END_KEYS]
    kinds = facts.metadata.get("tokenizer.ggml.token_type")
    texts = facts.metadata.get("tokenizer.ggml.tokens") or []
    known = []
    if isinstance(kinds, np.ndarray) and len(kinds) == len(texts):
        known = [int(token) for token in np.flatnonzero(kinds == CONTROL) if texts[token] in _END_TEXTS]
    return tuple(dict.fromkeys(token for token in (*named, *known) if token is not None))


def _head_fields(facts: ModelFacts, fields: Fields) -> Fields:
    """The size of a head, and which part of it is rotated if not all of it."""
    hidden, n_heads = fields["hidden_size"], fields["num_attention_heads"]
    size, value_size = facts.optional("attention.key_length"), facts.optional("attention.value_length")
    if size is None:
        if type(n_heads) is not int or n_heads < 1 or hidden % n_heads:
            raise facts.contradiction("heads", f"{n_heads} heads of a hidden size of {hidden}", "heads of one size")
        size = hidden // n_heads
    if value_size not in (None, size):
        raise CheckpointError(
            f"{facts.path} has keys and values of different sizes, which trt-kv does not support",
            got=f"key_length {size}, value_length {value_size}",
            expected="equal sizes",
        )
    rotated = facts.optional("rope.dimension_count") or size
    return {"head_dim": size} | ({"partial_rotary_factor": rotated / size} if rotated != size else {})


def _vocab_size(facts: ModelFacts, tensors: dict[str, GgufTensor]) -> int:
    tokens = facts.metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not tokens:
        raise CheckpointError(
            f"{facts.path} has no tokenizer",
            got="no tokenizer.ggml.tokens",
            expected="a GGUF file with its vocabulary",
            fix="pass the original checkpoint's folder, or a conversion that was not made with --no-vocab",
        )
    if EMBEDDING not in tensors:
        raise CheckpointError(f"{facts.path} has no {EMBEDDING}", expected="the weights of a decoder")
    n_rows, stated = tensors[EMBEDDING].shape[0], facts.optional("vocab_size")
    if len(tokens) != n_rows or stated not in (None, n_rows):
        raise facts.contradiction(
            "the size of the vocabulary",
            f"{len(tokens)} tokens, vocab_size {stated}, {n_rows} rows in {EMBEDDING}",
            "three equal numbers",
        )
    return n_rows


def _check_block_count(facts: ModelFacts, tensors: dict[str, GgufTensor], n_layers: Any) -> None:
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if blocks != {str(block) for block in range(n_layers)} if type(n_layers) is int and n_layers < 1 << 16 else True:
        raise facts.contradiction(
            "the number of layers", f"block_count {n_layers}, tensors of {len(blocks)} layers", "as many layers as block_count"
        )


def _rope_scaling(facts: ModelFacts, fields: Fields, tensors: dict[str, GgufTensor]) -> Fields | None:
    kind = facts.optional("rope.scaling.type")
    old_factor = facts.optional("rope.scale_linear")
    if ROPE_FACTORS in tensors:
        return _llama3_scaling(facts, fields, tensors[ROPE_FACTORS])
    if kind is None and old_factor in (None, 0.0, 1.0):
        return None
    factor = facts.optional("rope.scaling.factor") or old_factor
    if kind == "none" or (kind in (None, "linear") and factor in (None, 0.0, 1.0)):
        return None
    if kind in (None, "linear"):
        return {"rope_type": "linear", "factor": factor}
    scaling = {"rope_type": kind, "factor": factor}
    positions = facts.optional("rope.scaling.original_context_length")
    return scaling | ({} if positions is None else {"original_max_position_embeddings": positions})


def _llama3_scaling(facts: ModelFacts, fields: Fields, tensor: GgufTensor) -> Fields:
    size = fields["head_dim"]
    if tensor.scheme != "F32" or tensor.shape != (size // 2,):
        raise facts.contradiction(ROPE_FACTORS, f"{tensor.scheme} {list(tensor.shape)}", f"F32 {[size // 2]}")
    stored = tensor.read().view("<f4").reshape(-1)
    found = llama3_settings(stored, size=size, theta=fields["rope_theta"])
    if found is None:
        raise CheckpointError(
            f"{facts.path} scales its RoPE in a way that trt-kv does not know",
            got=f"{ROPE_FACTORS} from {stored.min():g} to {stored.max():g}",
            expected="the divisors of RoPE type llama3, with low_freq_factor 1 and high_freq_factor 4",
            fix="pass the original checkpoint, whose config.json has the settings",
        )
    return found


def llama3_settings(stored: np.ndarray, *, size: int, theta: float) -> Fields | None:
    """The settings of RoPE type llama3 whose divisors of the frequencies are ``stored`` (float32, one per pair of channels of a
    head of ``size``); None if there are none.

    In every published model ``low_freq_factor`` is 1, ``high_freq_factor`` 4, and the lowest frequency has the whole factor.
    The original context follows from any divisor in between; without one, it is that of the published models, or the nearest
    that has the same divisors.
    """
    divisors = stored.astype(np.float64)
    wavelengths = 2 * math.pi * theta ** (np.arange(0, size, 2) / size)
    factor = float(f"{divisors.max():.6g}")
    between = (divisors > 1 + _SAME) & (divisors < factor * (1 - _SAME))
    shortest = _LLAMA3_HIGH * wavelengths[divisors <= 1 + _SAME].max(initial=0.0)
    longest = wavelengths[divisors >= factor * (1 - _SAME)].min(initial=np.inf)
    positions = math.floor(min(max(_LLAMA3_POSITIONS, math.ceil(shortest)), longest))
    if between.any():
        smooth = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        positions = round(float(np.median(wavelengths[between] * (1 + (_LLAMA3_HIGH - 1) * smooth))))
    blend = np.clip((positions / wavelengths - 1) / (_LLAMA3_HIGH - 1), 0, 1)
    if not np.allclose(1 / ((1 - blend) / factor + blend), divisors, rtol=_SAME, atol=0):
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": _LLAMA3_HIGH,
        "original_max_position_embeddings": positions,
    }
