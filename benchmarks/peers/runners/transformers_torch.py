"""transformers with torch on the CPU, its default attention. Options: ``vocab_size``; ``dtype``.

Synthetic caches are its own ``DynamicCache``, given random keys and values.
"""

from typing import Any

import torch
import transformers

from benchmarks.peers.protocol import Answer, Job, Setup, prompt_ids
from benchmarks.peers.serving import Clock, Run, serve

CHUNK = 1024
"""Prompt tokens at a time: the whole prompt at once would need its attention matrix."""


def set_up(setup: Setup) -> tuple[dict[str, object], Run]:
    """See ``benchmarks.peers.serving.serve``."""
    torch.set_num_threads(setup.threads)
    dtype = getattr(torch, setup.options["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(setup.model, dtype=dtype).eval()
    vocab_size = setup.options["vocab_size"]

    @torch.inference_mode()
    def run(job: Job) -> Answer:
        cache = transformers.DynamicCache(config=model.config)
        if job.synthetic:
            _fill(cache, model.config, job.context, dtype)
            token = torch.tensor([[1000]])
            _step(model, token, cache)
            clock = Clock()
        else:
            ids = torch.tensor([prompt_ids(job, vocab_size)])
            clock = Clock()
            for part in ids.split(CHUNK, dim=1):
                token = _step(model, part, cache)
        clock.token()
        for _ in range(job.n_tokens):
            token = _step(model, token, cache)
            clock.token()
        return clock.answer(is_synthetic=job.synthetic)

    weights = {parameter.data_ptr(): parameter.nbytes for parameter in model.parameters()}
    return {"version": transformers.__version__, "torch": torch.__version__, "weight_bytes": sum(weights.values())}, run


def _step(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The likeliest next token [1, 1]."""
    logits: torch.Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].argmax(-1, keepdim=True)


def _fill(cache: Any, config: Any, n_tokens: int, dtype: torch.dtype) -> None:
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (1, config.num_key_value_heads, n_tokens, head_size)
    for layer in range(config.num_hidden_layers):
        cache.update(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), layer)


if __name__ == "__main__":
    serve(set_up)
