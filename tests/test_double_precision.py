"""Every family is computed as in transformers: in double precision, where no difference can be put down to rounding."""

import types
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.checkpoints import FAMILY_SAMPLES, edit_config, write_checkpoint
from tests.dense_reference import decoder_steps
from trt_kv.decoder import Decoder
from trt_kv.export.checkpoints.opening import open_checkpoint
from trt_kv.export.decoder import decoder_from_checkpoint

N_PROMPT, N_TOKENS = 37, 70
SHARP = {"granite-biases": {"attention_multiplier": 1.0}}
"""Attention so sharp that transformers in fp32 is 8e-5 off."""

pytestmark = pytest.mark.usefixtures("one_thread")


def normed(self: Any, x: Tensor) -> Tensor:
    """RMSNorm without transformers' detour through fp32."""
    eps = self.variance_epsilon if hasattr(self, "variance_epsilon") else self.eps
    weight = self.weight + 1 if type(self).__name__.startswith("Gemma") else self.weight
    scaled: Tensor = weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))
    return scaled


def of_transformers(folder: Path, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Logits [N, V] in float64, softmax and norms included; angles of RoPE stay fp32, as ours."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = types.MethodType(normed, module)
    softmax = torch.nn.functional.softmax
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "softmax", lambda x, **options: softmax(x, dim=options["dim"]))
        logits: Tensor = model(ids[None]).logits[0]
    return logits


def in_double(decoder: Decoder) -> Decoder:
    """Weights in float64; buffers, which are the frequencies and the factor of embeddings, as they are."""
    for parameter in decoder.parameters():
        parameter.data = parameter.data.double()
    return decoder


@pytest.mark.parametrize("sample", FAMILY_SAMPLES)
@torch.no_grad()
def test_a_decoder_in_double_precision_equals_transformers(
    sample: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_checkpoint(tmp_path, sample)
    edit_config(folder, **SHARP.get(sample, {}))
    checkpoint = open_checkpoint(folder)
    ids = torch.randint(3, checkpoint.config.vocab_size, (N_TOKENS,), generator=torch.Generator().manual_seed(5))
    expected = of_transformers(folder, ids, monkeypatch)
    decoder = in_double(decoder_from_checkpoint(checkpoint))
    got = torch.cat(list(decoder_steps(decoder, ids[:N_PROMPT], ids[N_PROMPT:].tolist())))
    assert got.dtype == expected.dtype == torch.float64
    # Gemma's norms are stored less 1; we add it in fp32, and so round once.
    atol = 3e-6 if sample.startswith("gemma") else 1e-10
    torch.testing.assert_close(got, expected, atol=atol, rtol=0)
