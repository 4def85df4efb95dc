"""onnxruntime-genai with one request at a time, in the order in which they are sent."""

import json
from collections import deque
from typing import Any

import onnxruntime_genai as genai

from benchmarks.peers.protocol import Setup
from benchmarks.peers.serving import serve
from benchmarks.serving_peers.loads import Load, Served, closed_loop


def set_up(setup: Setup) -> tuple[dict[str, object], Any]:
    """See ``benchmarks.peers.serving.serve``."""
    config = genai.Config(setup.model)
    sessions = {"model": {"decoder": {"session_options": {"intra_op_num_threads": setup.threads}}}}
    config.overlay(json.dumps(sessions))
    model = genai.Model(config)

    def run(load: Load) -> Served:
        waiting: deque[int] = deque()
        current: list[Any] = []

        def step() -> list[tuple[int, list[int]]]:
            if not current:
                current.extend([waiting[0], _generator(model, load.prompts[waiting[0]], load.n_tokens), load.n_tokens])
                waiting.popleft()
            at, generator, n_left = current
            generator.generate_next_token()
            current[2] = n_left - 1
            if n_left == 1:
                current.clear()
            return [(at, [int(generator.get_next_tokens()[0])])]

        return closed_loop(load, waiting.append, step)

    return {"version": genai.__version__}, run


def _generator(model: Any, prompt: list[int], n_tokens: int) -> Any:
    params = genai.GeneratorParams(model)
    length = len(prompt) + n_tokens
    params.set_search_options(max_length=length, min_length=length, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(prompt)
    return generator


if __name__ == "__main__":
    serve(set_up, Load)
