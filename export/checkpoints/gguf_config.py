"""A GGUF file's metadata as Hugging Face's ``config.json``."""

import math

import numpy as np

from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.gguf_families import FAMILIES, Fields, GgufFamily
from trt_kv.export.checkpoints.gguf_header import GgufTensor
from trt_kv.export.checkpoints.gguf_metadata import ModelFacts
from trt_kv.export.checkpoints.gguf_rope import rope_fields

EMBEDDING, OUTPUT = "token_embd.weight", "output.weight"

_SIZES = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
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
_ARITHMETIC = (
    "attention.sliding_window",
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.layer_norm_epsilon",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "use_parallel_residual",
    "nextn_predict_layers",
)
"""Keys that change results, if they have a value other than 0 or false. Each is read by the families that have it."""


def family_of(facts: ModelFacts) -> GgufFamily:
    """The family of the file's architecture. Raises ``CheckpointError`` for one that is not supported."""
    if facts.has_value("expert_count"):
        raise CheckpointError(
            f"{facts.path} holds a mixture of experts, which trt-kv does not support",
            got=f"architecture {facts.architecture!r} with {facts.integer('expert_count')} experts",
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
    fields |= {name: facts.required_integer(key) for key, name in _SIZES.items()}
    fields["rms_norm_eps"] = facts.required_number("attention.layer_norm_rms_epsilon")
    fields["num_key_value_heads"] = facts.integer("attention.head_count_kv") or fields["num_attention_heads"]
    fields |= _head_fields(facts, fields)
    fields["rope_theta"] = facts.number("rope.freq_base") or _THETA
    fields["vocab_size"] = _vocab_size(facts, tensors)
    fields["tie_word_embeddings"] = OUTPUT not in tensors
    fields["bos_token_id"] = facts.integer("tokenizer.ggml.bos_token_id", prefixed=False)
    fields["eos_token_id"] = list(end_tokens(facts))
    fields |= rope_fields(facts, head_dim=fields["head_dim"], theta=fields["rope_theta"], tensors=tensors)
    _check_block_count(facts, tensors, fields["num_hidden_layers"])
    _check_arithmetic(facts, family)
    return {**fields, **family.settings(facts, fields)}


def end_tokens(facts: ModelFacts) -> tuple[int, ...]:
    """The tokens that end a text: those that the metadata name, then control tokens with a well-known text."""
    named = [facts.integer(f"tokenizer.ggml.{key}", prefixed=False) for key in _END_KEYS]
    kinds = facts.metadata.get("tokenizer.ggml.token_type")
    texts = facts.metadata.get("tokenizer.ggml.tokens") or []
    known = []
    if isinstance(kinds, np.ndarray) and len(kinds) == len(texts):
        known = [int(token) for token in np.flatnonzero(kinds == CONTROL) if texts[token] in _END_TEXTS]
    return tuple(dict.fromkeys(token for token in (*named, *known) if token is not None))


def _head_fields(facts: ModelFacts, fields: Fields) -> Fields:
    """The size of a head, and which part of it is rotated if not all of it."""
    hidden, n_heads = fields["hidden_size"], fields["num_attention_heads"]
    size, value_size = facts.integer("attention.key_length"), facts.integer("attention.value_length")
    if not size:
        if hidden % n_heads:
            raise facts.contradiction("heads", f"{n_heads} heads of a hidden size of {hidden}", "heads of one size")
        size = hidden // n_heads
    if value_size not in (None, 0, size):
        raise CheckpointError(
            f"{facts.path} has keys and values of different sizes, which trt-kv does not support",
            got=f"key_length {size}, value_length {value_size}",
            expected="equal sizes",
        )
    rotated = facts.integer("rope.dimension_count") or size
    if rotated == size:
        return {"head_dim": size}
    share = rotated / size
    return {"head_dim": size, "partial_rotary_factor": share if int(size * share) == rotated else math.nextafter(share, 1.0)}


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
    n_rows, stated = tensors[EMBEDDING].shape[0], facts.integer("vocab_size")
    if len(tokens) != n_rows or stated not in (None, n_rows):
        raise facts.contradiction(
            "the size of the vocabulary",
            f"{len(tokens)} tokens, vocab_size {stated}, {n_rows} rows in {EMBEDDING}",
            "three equal numbers",
        )
    return n_rows


def _check_arithmetic(facts: ModelFacts, family: GgufFamily) -> None:
    stray = [key for key in _ARITHMETIC if key not in family.reads and facts.has_value(key)]
    if stray:
        raise CheckpointError(
            f"{facts.path} has arithmetic that trt-kv does not know of a {facts.architecture} model",
            got=", ".join(f"{facts.architecture}.{key} {facts.metadata[f'{facts.architecture}.{key}']}" for key in stray),
            expected="none of these",
        )


def _check_block_count(facts: ModelFacts, tensors: dict[str, GgufTensor], n_layers: int) -> None:
    blocks = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if n_layers != len(blocks) or blocks != {str(block) for block in range(n_layers)}:
        raise facts.contradiction(
            "the number of layers", f"block_count {n_layers}, tensors of {len(blocks)} layers", "as many layers as block_count"
        )
