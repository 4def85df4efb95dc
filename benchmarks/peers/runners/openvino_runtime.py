"""OpenVINO's runtime alone, on the model that OpenVINO GenAI made: one sequence, the cache as the model's state.

GenAI's pipeline reads every prompt. The state can be set, so this runner can do without: it stands for OpenVINO where reading
takes too long. Options: ``vocab_size``.
"""

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from benchmarks.peers.protocol import Answer, Job, Setup, prompt_ids
from benchmarks.peers.serving import Clock, Run, serve

CHUNK = 512
"""Prompt tokens at a time: logits of all of them are computed."""


def set_up(setup: Setup) -> tuple[dict[str, object], Run]:
    """See ``benchmarks.peers.serving.serve``."""
    model = ov.Core().read_model(Path(setup.model) / "openvino_model.xml")
    compiled = ov.compile_model(model, "CPU", {"INFERENCE_NUM_THREADS": setup.threads})
    request = compiled.create_infer_request()
    vocab_size = setup.options["vocab_size"]

    def step(ids: list[int], first: int) -> int:
        """Run tokens from position ``first`` on; the likeliest next one."""
        n_all = first + len(ids)
        inputs = {
            "input_ids": np.array([ids], np.int64),
            "attention_mask": np.ones((1, n_all), np.int64),
            "position_ids": np.arange(first, n_all)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        return int(request.infer(inputs)["logits"][0, -1].argmax())

    def run(job: Job) -> Answer:
        request.reset_state()
        if job.synthetic:
            step([1000, 1001], 0)
            _fill(request, job.context)
            token = step([1000], job.context)
            n_read = job.context + 1
            clock = Clock()
        else:
            prompt = prompt_ids(job, vocab_size)
            token, n_read = 0, job.context
            clock = Clock()
            for first in range(0, n_read, CHUNK):
                token = step(prompt[first : first + CHUNK], first)
        clock.token()
        for position in range(n_read, n_read + job.n_tokens):
            token = step([token], position)
            clock.token()
        return clock.answer(is_synthetic=job.synthetic)

    return {"version": ov.__version__, "cache": str(compiled.get_property("KV_CACHE_PRECISION"))}, run


def _fill(request: Any, n_tokens: int) -> None:
    """Random keys and values of ``n_tokens`` in every layer."""
    rng = np.random.default_rng(0)
    for state in request.query_state():
        batch, n_heads, _, head_size = state.state.shape
        state.state = ov.Tensor(rng.standard_normal((batch, n_heads, n_tokens, head_size), np.float32))


if __name__ == "__main__":
    serve(set_up)
