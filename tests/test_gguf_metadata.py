"""What a GGUF file says of its model: defaults, what contradicts itself, and what would change results unnoticed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from tests.gguf_files import (
    Q_PROJ,
    converted_weights,
    refusal,
    sample_metadata,
    sample_model,
    write_gguf,
    write_sample,
)
from tests.gguf_samples import SAMPLES, VOCAB_SIZE
from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.gguf_families import FAMILIES
from trt_kv.export.checkpoints.gguf_file import open_gguf
from trt_kv.export.checkpoints.gguf_metadata import ModelFacts


def test_files_of_old_converters_have_defaults(tmp_path: Path) -> None:
    absent: dict[str, Any] = {f"ARCH.{key}": ... for key in ("rope.freq_base", "rope.dimension_count")}
    config = open_gguf(write_sample(tmp_path / "a.gguf", changes=absent)).config
    assert (config.rope.theta, config.head_dim) == (10000.0, 16)
    config = open_gguf(write_sample(tmp_path / "b.gguf", changes={"ARCH.rope.scale_linear": 4.0})).config
    assert (config.rope.kind, config.rope.factor) == ("linear", 4.0)


def test_a_window_makes_a_llama_a_mistral(tmp_path: Path) -> None:
    """As in its config.json: a file of the first Mistral whose converter wrote the window."""
    config = open_gguf(write_sample(tmp_path / "a.gguf", "mistral", changes={"ARCH.attention.sliding_window": 24})).config
    assert (config.architecture, config.windows) == ("mistral", (24, 24))


def test_gemmas_have_the_windows_of_llama_cpp(tmp_path: Path) -> None:
    """Without one in the file Gemma 2 has its own, and Gemma 3 none, with one RoPE; Gemma 3 may say it of each layer."""
    key = "ARCH.attention.sliding_window"
    config = open_gguf(write_sample(tmp_path / "a.gguf", "gemma2", changes={key: ..., "ARCH.context_length": 8192})).config
    assert config.windows == (4096, 0)
    config = open_gguf(write_sample(tmp_path / "b.gguf", "gemma3", changes={key: ...})).config
    assert (config.windowed_layers, config.local_rope_layers) == ((), ())
    config = open_gguf(write_sample(tmp_path / "c.gguf", "gemma3", changes={f"{key}_pattern": [False, True]})).config
    assert (config.windows, config.local_rope_layers) == ((0, 24), (1,))
    config = open_gguf(write_sample(tmp_path / "d.gguf", "gemma3", changes={f"{key}_pattern": 2})).config
    assert (config.windows, config.local_rope_layers) == ((24, 0), (0,))


@pytest.mark.parametrize(
    ("name", "layers", "width", "scale"), [("gemma2", 46, 4608, 144), ("gemma3", 62, 5376, 168), ("gemma2", 42, 3584, 256)]
)
def test_the_largest_gemmas_scale_attention_by_their_width(name: str, layers: int, width: int, scale: int) -> None:
    """Which no GGUF file says: the rule of llama.cpp."""
    n_heads = 16 if width == 3584 else 32
    fields = {"num_hidden_layers": layers, "hidden_size": width, "num_attention_heads": n_heads, "head_dim": 256}
    metadata = {f"{name}.attention.sliding_window": 4096}
    facts = ModelFacts(path=Path("a.gguf"), metadata=metadata, architecture=name, tensor_names=())
    assert FAMILIES[name].settings(facts, fields)["query_pre_attn_scalar"] == scale


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ARCH.block_count": ...}, ["llama.block_count"]),
        ({"ARCH.embedding_length": ...}, ["llama.embedding_length"]),
        ({"ARCH.block_count": 3}, ["block_count 3", "2 layers"]),
        ({"ARCH.block_count": 1}, ["block_count 1", "2 layers"]),
        ({"ARCH.block_count": 2**31}, ["block_count", "2147483648"]),
        ({"ARCH.attention.head_count": 7}, ["7 heads", "96"]),
        ({"ARCH.attention.head_count": 0}, ["llama.attention.head_count", "an integer >= 1"]),
        ({"ARCH.attention.head_count": "six"}, ["six"]),
        ({"ARCH.attention.head_count_kv": 3}, ["attn_k.weight", "[32, 96]", "[48, 96]"]),
        ({"ARCH.attention.head_count_kv": [1, 2]}, ["head_count_kv", "differs from layer to layer"]),
        ({"ARCH.feed_forward_length": 192}, ["ffn_gate.weight", "[192, 96]"]),
        ({"ARCH.attention.key_length": 24, "ARCH.rope.dimension_count": 24}, ["attn_q.weight", "[144, 96]"]),
        ({"ARCH.attention.value_length": 24}, ["key_length 16, value_length 24"]),
        ({"ARCH.vocab_size": VOCAB_SIZE + 1}, [f"vocab_size {VOCAB_SIZE + 1}", f"{VOCAB_SIZE} rows"]),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, ["2 tokens", f"{VOCAB_SIZE} rows"]),
        ({"tokenizer.ggml.tokens": ...}, ["no tokenizer"]),
        ({"tokenizer.ggml.token_type": [1, 2]}, ["one type per token"]),
        ({"tokenizer.ggml.eos_token_id": VOCAB_SIZE}, ["special token"]),
        ({"tokenizer.ggml.unknown_token_id": VOCAB_SIZE}, ["unknown_token_id"]),
        ({"tokenizer.ggml.model": "rwkv"}, ["rwkv", "gpt2"]),
        ({"tokenizer.ggml.pre": "deepseek-coder"}, ["deepseek-coder", "llama-bpe"]),
        ({"ARCH.expert_count": 8}, ["mixture of experts"]),
        ({"ARCH.attn_logit_softcapping": 30.0}, ["llama.attn_logit_softcapping 30.0"]),
        ({"ARCH.logit_scale": 0.5, "ARCH.use_parallel_residual": True}, ["logit_scale 0.5", "use_parallel_residual"]),
        ({"ARCH.rope.scaling.type": "su"}, ["rope.scaling.type 'su'", "yarn"]),
        (
            {"ARCH.rope.scaling.type": "yarn", "ARCH.rope.scaling.factor": 2.0, "ARCH.rope.scaling.yarn_log_multiplier": 0.1},
            ["yarn_log_multiplier 0.1"],
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else "",
)
def test_metadata_that_are_missing_or_contradict_are_named(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        open_gguf(write_sample(tmp_path / "model.gguf", changes=changes))
    message = str(caught.value)
    for word in words:
        assert word in message
    if "special token" not in message:
        assert "model.gguf" in message


@pytest.mark.parametrize("architecture", ["mamba", "deepseek2", "clip"])
def test_other_architectures_are_refused_with_the_list(architecture: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", {"output_norm.weight": np.ones(32)}, {}, architecture=architecture)
    error = refusal(path)
    assert architecture in str(error.got)
    assert "llama" in str(error.expected)


def test_missing_and_foreign_weights_are_named(tmp_path: Path) -> None:
    sample = SAMPLES["llama"]
    weights = converted_weights(sample, sample_model(sample))
    ffn = weights.pop("blk.1.ffn_up.weight")
    error = refusal(write_gguf(tmp_path / "a.gguf", weights, sample_metadata(sample)))
    assert "missing blk.1.ffn_up.weight" in str(error.got)
    weights |= {"blk.1.ffn_up.weight": ffn, "blk.1.ffn_up_shexp.weight": ffn}
    error = refusal(write_gguf(tmp_path / "b.gguf", weights, sample_metadata(sample)))
    assert "left over blk.1.ffn_up_shexp.weight" in str(error.got)


FUZZED = sorted([*sample_metadata(SAMPLES["llama"]), "general.architecture", "split.no", "split.count", "llama.expert_count"])
MORE = [
    f"llama.{key}" for key in ("rope.scaling.type", "rope.scaling.factor", "attention.key_length", "attention.sliding_window")
]
STRANGE = [0, 1, 7, -1, 2**32 - 1, 0.0, 1e30, float("nan"), float("inf"), "x", "", True, [1, 2], [0.5], ["a", "b"], [], "yarn"]


@pytest.fixture(scope="module")
def sample_weights() -> dict[str, NDArray[Any]]:
    return converted_weights(SAMPLES["llama"], sample_model(SAMPLES["llama"]))


@given(changes=st.dictionaries(st.sampled_from([*FUZZED, *MORE]), st.sampled_from(STRANGE), min_size=1, max_size=3))
def test_strange_metadata_are_refused_or_harmless_but_never_a_crash(
    changes: dict[str, Any], sample_weights: dict[str, NDArray[Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "strange.gguf"
    write_gguf(path, sample_weights, {**sample_metadata(SAMPLES["llama"]), **changes}, architecture=None)
    try:
        checkpoint = open_gguf(path)
        assert checkpoint.tokenizer_files
        assert checkpoint.tensor(Q_PROJ).shape == checkpoint.config.tensor_shapes()[Q_PROJ]
    except CheckpointError:
        return
