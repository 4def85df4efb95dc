"""What an engine is compared with: transformers, and the torch decoder with plain attention over everything."""

from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from torch import Tensor

from trt_kv.decoder import Decoder
from trt_kv.model_config import ModelConfig


class ContiguousCache:
    """Plain attention over everything seen so far, one sequence; an ``Attend``."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor) -> Tensor:
        if layer in self.kv:
            k_NKD, v_NKD = torch.cat((self.kv[layer][0], k_NKD)), torch.cat((self.kv[layer][1], v_NKD))
        self.kv[layer] = (k_NKD, v_NKD)
        n_new, n_cached = q_NHD.shape[0], k_NKD.shape[0]
        age = torch.arange(n_cached - n_new, n_cached).unsqueeze(1) - torch.arange(n_cached)
        window = (self.config.windows or [0] * (layer + 1))[layer] or n_cached
        k_NHD, v_NHD = (x.repeat_interleave(self.config.group_size, dim=1) for x in (k_NKD, v_NKD))
        logits = self.config.scale * torch.einsum("nhd,mhd->hnm", q_NHD, k_NHD)
        if self.config.attention_soft_cap:
            logits = self.config.attention_soft_cap * torch.tanh(logits / self.config.attention_soft_cap)
        weights = logits.masked_fill((age < 0) | (age >= window), -torch.inf).softmax(-1)
        return torch.einsum("hnm,mhd->nhd", weights, v_NHD)


def decoder_steps(decoder: Decoder, prompt: Tensor, tokens: list[int]) -> Iterator[Tensor]:
    """Logits ``[R, V]`` of the prompt's rows, then of each token of ``tokens``."""
    cache = ContiguousCache(decoder.config)
    positions = torch.arange(len(prompt))
    yield decoder(prompt, positions, positions, cache)
    for step, token in enumerate(tokens):
        yield decoder(torch.tensor([token]), torch.tensor([len(prompt) + step]), torch.tensor([0]), cache)


def transformers_steps(folder: Path, prompt: Tensor, n_steps: int) -> Iterator[Tensor]:
    """The same from transformers, which also chooses the tokens greedily."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    output = model(prompt[None], use_cache=True)
    yield output.logits[0]
    for _ in range(n_steps):
        output = model(output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values, use_cache=True)
        yield output.logits[0]
