"""The decoder computes what transformers computes, for every architecture, through prefill and decoding."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints import FAMILY_SAMPLES, SAMPLES, spell_rope_the_old_way, write_checkpoint
from tests.dense_reference import ContiguousCache, decoder_steps, transformers_steps
from trt_kv.decoder import Decoder
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.presets import preset

N_PROMPT, N_DECODED = 37, 32
ATOL = 1e-4
"""Between two fp32 implementations whose sums run in different orders; logits here spread over several units."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small lose more to waiting threads than they gain, up to tenfold on a busy machine."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@torch.no_grad()
def assert_parity(folder: Path) -> None:
    checkpoint = open_checkpoint(folder)
    prompt = torch.randint(3, checkpoint.config.vocab_size, (N_PROMPT,), generator=torch.Generator().manual_seed(5))
    expected = list(transformers_steps(folder, prompt, N_DECODED))
    tokens = [int(logits[-1].argmax()) for logits in expected]
    got = list(decoder_steps(decoder_from_checkpoint(checkpoint), prompt, tokens[:-1]))
    assert [int(logits[-1].argmax()) for logits in got] == tokens
    assert min(float(logits.std()) for logits in expected) > 1.0, "logits too flat for the comparison to mean anything"
    torch.testing.assert_close(torch.cat(got), torch.cat(expected), atol=ATOL, rtol=0.0)


@pytest.mark.parametrize("sample", [*SAMPLES, *FAMILY_SAMPLES])
def test_logits_and_greedy_tokens_equal_those_of_transformers(sample: str, tmp_path: Path) -> None:
    assert_parity(write_checkpoint(tmp_path, sample))


@pytest.mark.parametrize("sample", ["llama3-rope", "llama-linear-rope", "mistral"])
def test_the_old_rope_spelling_means_the_same(sample: str, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, sample)
    config = open_checkpoint(folder).config
    spell_rope_the_old_way(folder)
    assert open_checkpoint(folder).config == config
    assert_parity(folder)


def test_sharded_bfloat16_weights_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    assert_parity(write_checkpoint(tmp_path, "qwen3", shard_size="40KB", dtype=torch.bfloat16))


def test_the_bundled_checkpoint_has_parity() -> None:
    assert_parity(preset("llama3").bundled_folder)


@pytest.mark.parametrize("sample", [*SAMPLES, "gemma3", "olmo2", "phi3"])
def test_on_the_meta_device_a_decoder_allocates_nothing_and_names_every_weight(sample: str, tmp_path: Path) -> None:
    config = open_checkpoint(write_checkpoint(tmp_path, sample)).config
    with torch.device("meta"):
        decoder = Decoder(config)
    assert all(parameter.is_meta for parameter in decoder.parameters())
    assert not decoder.rotary.frequencies.is_meta
    assert {name: tuple(tensor.shape) for name, tensor in decoder.state_dict().items()} == config.tensor_shapes()


@torch.no_grad()
def test_logits_come_only_for_the_rows_asked_for_and_in_their_order(tmp_path: Path) -> None:
    decoder = decoder_from_checkpoint(open_checkpoint(write_checkpoint(tmp_path)))
    ids, positions, rows = torch.arange(3, 14), torch.arange(11), torch.tensor([7, 2])
    every = decoder(ids, positions, positions, ContiguousCache(decoder.config))
    torch.testing.assert_close(decoder(ids, positions, rows, ContiguousCache(decoder.config)), every[rows], atol=ATOL, rtol=0.0)


def test_weights_that_already_have_the_dtype_stay_memory_mapped(tmp_path: Path) -> None:
    decoder = decoder_from_checkpoint(open_checkpoint(write_checkpoint(tmp_path, dtype=torch.bfloat16)), torch.bfloat16)
    assert {(parameter.dtype, parameter.requires_grad) for parameter in decoder.parameters()} == {(torch.bfloat16, False)}
    assert str(tmp_path / "model.safetensors") in Path("/proc/self/maps").read_text()
