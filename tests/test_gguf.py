"""A GGUF file is read as the model it was made from: config, weights, tokenizer; what contradicts itself is refused by name."""

import gc
import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.dense_reference import decoder_steps, transformers_steps
from tests.gguf_files import (
    SAMPLES,
    SIZES,
    TEMPLATE,
    VOCAB_SIZE,
    converted_weights,
    sample_metadata,
    sample_model,
    write_gguf,
    write_sample,
)
from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.gguf_file import open_gguf
from trt_kv.export.checkpoints.huggingface import open_huggingface
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint

Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


def refusal(path: Path) -> CheckpointError:
    """The error that opening ``path`` ends in; it names the file."""
    with pytest.raises(CheckpointError) as caught:
        open_gguf(path)
    assert str(path) in caught.value.what
    return caught.value


@pytest.mark.parametrize("name", SAMPLES)
def test_a_file_has_the_config_and_the_weights_of_its_model(name: str, tmp_path: Path) -> None:
    """Bit by bit, against the same model saved in Hugging Face layout."""
    model = sample_model(SAMPLES[name])
    model.save_pretrained(tmp_path / "folder")
    expected = open_huggingface(tmp_path / "folder")
    got = open_gguf(write_sample(tmp_path / "model.gguf", name))
    fields, wanted = got.config.to_json(), expected.config.to_json()
    if name == "mistral":  # its GGUF architecture is llama, whose arithmetic is the same
        fields["architecture"] = "mistral"
    assert fields.pop("eos_token_ids") == [2, 4]
    wanted.pop("eos_token_ids")
    assert fields == wanted
    assert got.tensor_names == expected.tensor_names
    for tensor in got.tensor_names:
        torch.testing.assert_close(got.tensor(tensor), expected.tensor(tensor), atol=0.0, rtol=0.0)


@pytest.mark.parametrize(("name", "scheme"), [("llama", "Q8_0"), ("qwen2", "Q4_0"), ("qwen3", "Q5_1"), ("llama", "BF16")])
@torch.no_grad()
def test_logits_equal_those_of_transformers_on_the_same_file(name: str, scheme: str, tmp_path: Path) -> None:
    """Transformers' own reader of the file: another dequantisation, another order of q and k, another table of names."""
    path = write_sample(tmp_path / "model.gguf", name, scheme=scheme)
    checkpoint = open_gguf(path)
    # transformers takes the head size of Qwen3 not from the file but from the published models
    config = {**load_gguf_checkpoint(path)["config"], "head_dim": checkpoint.config.head_dim}
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    state = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    model.load_state_dict(state, strict=not model.config.tie_word_embeddings)
    model.save_pretrained(tmp_path / "folder")
    prompt = torch.randint(5, VOCAB_SIZE, (23,), generator=torch.Generator().manual_seed(3))
    expected = list(transformers_steps(tmp_path / "folder", prompt, 6))
    tokens = [int(logits[-1].argmax()) for logits in expected]
    got = list(decoder_steps(decoder_from_checkpoint(checkpoint), prompt, tokens[:-1]))
    assert min(float(logits.std()) for logits in expected) > 0.5, "logits too flat for the comparison to mean anything"
    torch.testing.assert_close(torch.cat(got), torch.cat(expected), atol=1e-4, rtol=0.0)


def dequantised(scheme: str, blocks: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Our own reading of blocks of 32 values, by the definitions in ggml's ``ggml-common.h``, value by value."""
    values = np.empty((*blocks.shape[:-1], 32), dtype=np.float32)
    halves = {"q4_0": 1, "q4_1": 2, "q8_0": 1}[scheme]
    numbers = blocks[..., : 2 * halves].copy().view("<f2").astype(np.float32)
    stored = blocks[..., 2 * halves :]
    for i in range(32):
        if scheme == "q8_0":
            values[..., i] = stored[..., i].view(np.int8) * numbers[..., 0]
            continue
        nibble = ((stored[..., i % 16] >> (4 * (i // 16))) & 15).astype(np.float32)
        values[..., i] = numbers[..., 0] * (nibble - 8) if scheme == "q4_0" else numbers[..., 0] * nibble + numbers[..., 1]
    return values.reshape(*blocks.shape[:-2], -1)


@pytest.mark.parametrize("scheme", ["Q4_0", "Q4_1", "Q8_0"])
def test_the_stored_blocks_have_the_values_of_the_tensor(scheme: str, tmp_path: Path) -> None:
    checkpoint = open_gguf(write_sample(tmp_path / "model.gguf", scheme=scheme))
    for name in checkpoint.tensor_names:
        found = checkpoint.quantized(name)
        if len(checkpoint.config.tensor_shapes()[name]) == 1:
            assert found is None
            continue
        assert found is not None
        assert (found.scheme, found.shape) == (scheme.lower(), checkpoint.config.tensor_shapes()[name])
        values = dequantised(found.scheme, found.blocks)
        np.testing.assert_array_equal(values, checkpoint.tensor(name).numpy())


def test_numbers_and_folders_have_no_blocks(tmp_path: Path, small_checkpoint_folder: Path) -> None:
    for checkpoint in (open_gguf(write_sample(tmp_path / "a.gguf", scheme="F16")), open_checkpoint(small_checkpoint_folder)):
        assert all(checkpoint.quantized(name) is None for name in checkpoint.tensor_names)


@pytest.mark.parametrize(("scheme", "dtype"), [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_numbers_keep_their_type(scheme: str, dtype: torch.dtype, tmp_path: Path) -> None:
    assert open_gguf(write_sample(tmp_path / "a.gguf", scheme=scheme)).tensor(Q_PROJ).dtype == dtype


K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "IQ1_M"]


@pytest.mark.parametrize("scheme", K_QUANTS)
def test_other_quantisations_are_read_as_transformers_reads_them(scheme: str, tmp_path: Path) -> None:
    """The gguf package cannot write most of them: blocks of random bytes, whose 16-bit floats are made finite."""
    from transformers.integrations.gguf import dequant

    from trt_kv.export.checkpoints.gguf_header import read_gguf_header
    from trt_kv.export.checkpoints.gguf_tensors import StoredRows

    kind = gguf.GGMLQuantizationType[scheme]
    n_items, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(5).integers(0, 256, (7, 3 * n_bytes), dtype=np.uint8)
    blocks &= 0xBF  # no byte, and so no float, has all bits of an exponent
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=kind)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        write()
    (tensor,) = read_gguf_header(tmp_path / "a.gguf").tensors.values()
    shape = (7, 3 * n_items)
    values = StoredRows(tensor=tensor, shape=shape, stored_shape=shape).values()
    expected = dequant.dequantize(torch.from_numpy(blocks.reshape(-1)), int(kind)).reshape(shape)
    assert values.isfinite().all()
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)


def test_the_digest_follows_arithmetic_and_weights_only(tmp_path: Path) -> None:
    plain = open_gguf(write_sample(tmp_path / "a.gguf"))
    renamed = open_gguf(write_sample(tmp_path / "b.gguf", changes={"general.name": "other", "ARCH.context_length": 64}))
    assert renamed.digest == plain.digest
    assert plain.digest.startswith("sha256:")
    others = [
        write_sample(tmp_path / "c.gguf", scheme="F16"),
        write_sample(tmp_path / "d.gguf", changes={"ARCH.rope.freq_base": 4000.0}),
    ]
    data = bytearray((tmp_path / "a.gguf").read_bytes())
    data[-200] ^= 1
    (tmp_path / "e.gguf").write_bytes(data)
    digests = {open_gguf(path).digest for path in (*others, tmp_path / "e.gguf")}
    assert len(digests | {plain.digest}) == 4


def test_a_name_is_the_files_without_suffix_and_part(tmp_path: Path) -> None:
    assert open_gguf(write_sample(tmp_path / "Model-1.5B.Q4_0.gguf", scheme="Q4_0")).name == "Model-1.5B.Q4_0"
    assert open_gguf(tmp_path / "Model-1.5B.Q4_0.gguf", revision="v2").name == "Model-1.5B.Q4_0@v2"


def write_parts(folder: Path, *, numbers: tuple[int, ...] = (0, 1, 2), count: int = 3) -> list[Path]:
    """The sample in three files, as gguf-split leaves them: all metadata in the first."""
    sample = SAMPLES["llama"]
    weights = list(converted_weights(sample, sample_model(sample)).items())
    paths = []
    for place, number in enumerate(numbers):
        metadata = sample_metadata(sample) if place == 0 else {}
        part = dict(weights[place::3])
        path = folder / f"model-{place + 1:05}-of-00003.gguf"
        paths.append(write_gguf(path, part, metadata, split={"no": number, "count": count}))
    return paths


def test_a_file_in_parts_is_read_from_any_of_them(tmp_path: Path) -> None:
    whole = open_gguf(write_sample(tmp_path / "model.gguf"))
    parts = write_parts(tmp_path)
    for part in parts:
        checkpoint = open_gguf(part)
        assert (checkpoint.digest, checkpoint.name, checkpoint.location) == (whole.digest, "model", parts[0])


def test_missing_and_mixed_up_parts_are_refused(tmp_path: Path) -> None:
    parts = write_parts(tmp_path)
    parts[1].rename(tmp_path / "elsewhere")
    assert parts[1].name in str(refusal(parts[0]).got)
    (tmp_path / "other").mkdir()
    for numbers, count in (((0, 2, 1), 3), ((0, 1, 2), 4)):
        parts = write_parts(tmp_path / "other", numbers=numbers, count=count)
        with pytest.raises(CheckpointError, match="is not the part that its name says"):
            open_gguf(parts[0])


def test_tokenizer_files_live_as_long_as_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = open_gguf(write_sample(tmp_path / "model.gguf"))
    files = checkpoint.tokenizer_files
    assert set(files) == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert files["chat_template.jinja"].read_text() == TEMPLATE
    assert json.loads(files["generation_config.json"].read_text()) == {"bos_token_id": 1, "eos_token_id": [2, 4]}
    assert transformers.AutoConfig.from_pretrained(checkpoint.tokenizer_file.parent).hidden_size == SIZES["hidden_size"]
    folder = checkpoint.tokenizer_file.parent
    del checkpoint
    gc.collect()
    assert not folder.exists()


def test_well_known_ends_of_a_turn_end_a_text(tmp_path: Path) -> None:
    """Only if they are control tokens: a vocabulary may have the text as a normal one."""
    sample = sample_metadata(SAMPLES["llama"])
    tokens, kinds = sample["tokenizer.ggml.tokens"].copy(), sample["tokenizer.ggml.token_type"].copy()
    tokens[3], tokens[200] = "<|im_end|>", "<end_of_turn>"
    merges = [merge for merge in sample["tokenizer.ggml.merges"] if "".join(merge.split()) in tokens]
    changes = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges, "tokenizer.ggml.eot_token_id": ...}
    assert open_gguf(write_sample(tmp_path / "a.gguf", changes=changes)).eos_token_ids == (2, 3)
    kinds[200] = 3
    changes["tokenizer.ggml.token_type"] = kinds
    assert open_gguf(write_sample(tmp_path / "b.gguf", changes=changes)).eos_token_ids == (2, 3, 200)


def test_files_of_old_converters_have_defaults(tmp_path: Path) -> None:
    absent: dict[str, Any] = {f"ARCH.{key}": ... for key in ("rope.freq_base", "rope.dimension_count")}
    config = open_gguf(write_sample(tmp_path / "a.gguf", changes=absent)).config
    assert (config.rope.theta, config.head_dim) == (10000.0, 16)
    config = open_gguf(write_sample(tmp_path / "b.gguf", changes={"ARCH.rope.scale_linear": 4.0})).config
    assert (config.rope.kind, config.rope.factor) == ("linear", 4.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ARCH.block_count": ...}, ["llama.block_count"]),
        ({"ARCH.embedding_length": ...}, ["llama.embedding_length"]),
        ({"ARCH.block_count": 3}, ["block_count 3", "2 layers"]),
        ({"ARCH.block_count": 1}, ["block_count 1", "2 layers"]),
        ({"ARCH.block_count": 2**31}, ["block_count 2147483648"]),
        ({"ARCH.attention.head_count": 7}, ["7 heads", "96"]),
        ({"ARCH.attention.head_count": 0}, ["0 heads"]),
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
        ({"ARCH.rope.scaling.type": "su"}, ["su"]),
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


def llama3_divisors(*, factor: float, positions: int, size: int = 16, theta: float = 10000.0) -> NDArray[np.float32]:
    """The divisors of each frequency as the converter computes them (transformers' ``_compute_llama3_parameters``)."""
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        head_dim=size, rope_parameters={**rope, "original_max_position_embeddings": positions}, max_position_embeddings=10**6
    )
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = theta ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
    return (plain / scaled.double()).to(torch.float32).numpy()


@given(
    factor=st.sampled_from([2.0, 4.0, 8.0, 32.0]),
    positions=st.integers(32, 16_000),
    size_and_theta=st.sampled_from([(16, 10000.0), (64, 500000.0), (128, 500000.0)]),
)
def test_llama3_rope_is_found_from_its_stored_divisors(
    factor: float, positions: int, size_and_theta: tuple[int, float]
) -> None:
    """The settings found give the same divisors; where a frequency is blended, also the same original context."""
    from trt_kv.export.checkpoints.gguf_config import llama3_settings

    size, theta = size_and_theta
    stored = llama3_divisors(factor=factor, positions=positions, size=size, theta=theta)
    found = llama3_settings(stored, size=size, theta=theta)
    assert found is not None
    again = llama3_divisors(factor=found["factor"], positions=found["original_max_position_embeddings"], size=size, theta=theta)
    np.testing.assert_allclose(again, stored, rtol=2e-4)


def test_rope_divisors_become_the_settings_of_llama3(tmp_path: Path) -> None:
    sample = SAMPLES["llama"]
    weights = converted_weights(sample, sample_model(sample))
    metadata = {**sample_metadata(sample), "llama.rope.freq_base": 10000.0}
    weights["rope_freqs.weight"] = llama3_divisors(factor=4.0, positions=32)
    rope = open_gguf(write_gguf(tmp_path / "a.gguf", weights, metadata)).config.rope
    assert (rope.kind, rope.factor, rope.low_freq_factor, rope.high_freq_factor) == ("llama3", 4.0, 1.0, 4.0)
    assert rope.original_max_positions == 32
    weights["rope_freqs.weight"] = np.linspace(1, 3, 8, dtype=np.float32)
    assert "rope_freqs.weight" in str(refusal(write_gguf(tmp_path / "b.gguf", weights, metadata)).got)


def test_a_folder_of_gguf_files_says_to_pass_one(tmp_path: Path) -> None:
    write_sample(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="holds GGUF files") as caught:
        open_checkpoint(tmp_path)
    assert str(tmp_path / "model.gguf") in str(caught.value.fix)


def test_a_file_that_shrinks_after_opening_is_an_error_and_not_a_crash(tmp_path: Path) -> None:
    checkpoint = open_gguf(write_sample(tmp_path / "model.gguf"))
    with (tmp_path / "model.gguf").open("r+b") as file:
        file.truncate(100)
    with pytest.raises(CheckpointError, match="became shorter"):
        checkpoint.tensor(Q_PROJ)
    with pytest.raises(CheckpointError, match="became shorter"):
        assert checkpoint.digest
    (tmp_path / "model.gguf").unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        checkpoint.tensor(Q_PROJ)
