"""The model smollm2, if its package is installed: a real GGUF file, read as transformers reads it."""

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from tests.dense_reference import decoder_steps, transformers_steps
from tests.test_decoder_parity import ATOL
from tests.test_gguf import dequantised
from trt_kv.export.checkpoints.gguf_file import open_gguf
from trt_kv.export.decoder import decoder_from_checkpoint
from trt_kv.presets import PRESETS

LOCATION = PRESETS["smollm2"].location
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(LOCATION is None, reason=f"not installed: {PRESETS['smollm2'].install_command}"),
]
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def path() -> Path:
    assert LOCATION is not None
    return LOCATION


@torch.no_grad()
def test_weights_tokens_and_logits_are_those_of_transformers(path: Path, tmp_path: Path) -> None:
    checkpoint = open_gguf(path)
    config = transformers.AutoConfig.for_model(**load_gguf_checkpoint(path)["config"])
    model = transformers.AutoModelForCausalLM.from_config(config)
    weights = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    for name in checkpoint.tensor_names:
        torch.testing.assert_close(checkpoint.tensor(name), weights[name], atol=0.0, rtol=0.0)
        blocks = checkpoint.quantized(name)
        if blocks is not None and name.startswith("model.layers.7."):
            values = dequantised(blocks.scheme, blocks.blocks)
            torch.testing.assert_close(torch.from_numpy(values), weights[name], atol=0.0, rtol=0.0)
    model.load_state_dict(weights, strict=False)
    model.save_pretrained(tmp_path)
    ids = Tokenizer.from_file(str(checkpoint.tokenizer_file)).encode(PROMPT).ids
    assert ids == transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)(PROMPT).input_ids
    prompt = torch.tensor(ids)
    expected = list(transformers_steps(tmp_path, prompt, 16))
    tokens = [int(logits[-1].argmax()) for logits in expected]
    got = list(decoder_steps(decoder_from_checkpoint(checkpoint), prompt, tokens[:-1]))
    assert [int(logits[-1].argmax()) for logits in got] == tokens
    torch.testing.assert_close(torch.cat(got), torch.cat(expected), atol=10 * ATOL, rtol=0.0)


def test_its_ends_and_its_template_are_found(path: Path) -> None:
    checkpoint = open_gguf(path)
    assert checkpoint.eos_token_ids[0] == 2
    assert "<|im_start|>" in checkpoint.tokenizer_files["chat_template.jinja"].read_text()
