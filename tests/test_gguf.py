"""A GGUF file is read as the model it was made from: config, weights, tokenizer, from one file or several."""

import gc
import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.dense_reference import decoder_steps, transformers_steps
from tests.gguf_files import Q_PROJ, converted_weights, refusal, sample_metadata, sample_model, write_gguf, write_sample
from tests.gguf_samples import SAMPLES, SIZES, TEMPLATE, VOCAB_SIZE
from trt_kv.errors import CheckpointError
from trt_kv.export.checkpoints.context import in_context
from trt_kv.export.checkpoints.gguf_file import open_gguf
from trt_kv.export.checkpoints.huggingface import open_huggingface
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint


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
    factor = fields["rope"].pop("attention_factor", 1.0)  # of LongRoPE: stored as float32
    assert factor == pytest.approx(wanted["rope"].pop("attention_factor", 1.0), rel=1e-6)
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
    values = StoredRows(tensor=tensor, shape=shape).values()
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


def test_a_shorter_context_keeps_weights_and_tokenizer(tmp_path: Path) -> None:
    checkpoint = in_context(open_gguf(write_sample(tmp_path / "model.gguf", "gemma2", scheme="Q8_0")), 20)
    assert checkpoint.config.max_positions == 20
    assert checkpoint.tokenizer_file.is_file()
    assert checkpoint.tensor(Q_PROJ).shape == checkpoint.config.tensor_shapes()[Q_PROJ]


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


def test_fused_rows_keep_their_blocks(tmp_path: Path) -> None:
    checkpoint = open_gguf(write_sample(tmp_path / "a.gguf", "phi3", scheme="Q4_1"))
    for part in ("q_proj", "k_proj", "v_proj"):
        name = f"model.layers.1.self_attn.{part}.weight"
        found = checkpoint.quantized(name)
        assert found is not None
        assert found.shape == checkpoint.config.tensor_shapes()[name]
        np.testing.assert_array_equal(dequantised(found.scheme, found.blocks), checkpoint.tensor(name).numpy())


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
