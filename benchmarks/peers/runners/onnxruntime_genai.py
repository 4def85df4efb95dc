"""onnxruntime-genai, on a folder that its model builder wrote. Options: ``vocab_size``."""

import json
from pathlib import Path

import onnxruntime_genai as genai

from benchmarks.peers.protocol import Answer, Job, Setup, prompt_ids
from benchmarks.peers.serving import Clock, Run, serve


def set_up(setup: Setup) -> tuple[dict[str, object], Run]:
    """See ``benchmarks.peers.serving.serve``."""
    config = genai.Config(setup.model)
    sessions = {"model": {"decoder": {"session_options": {"intra_op_num_threads": setup.threads}}}}
    config.overlay(json.dumps(sessions))
    model = genai.Model(config)
    vocab_size = setup.options["vocab_size"]

    def run(job: Job) -> Answer:
        params = genai.GeneratorParams(model)
        n_tokens = job.context + job.n_tokens + 1
        params.set_search_options(max_length=n_tokens, min_length=n_tokens, do_sample=False)
        generator = genai.Generator(model, params)
        prompt = prompt_ids(job, vocab_size)
        clock = Clock()
        generator.append_tokens(prompt)
        for _ in range(job.n_tokens + 1):
            generator.generate_next_token()
            clock.token()
        return clock.answer()

    return {"version": genai.__version__, "model": Path(setup.model).name}, run


if __name__ == "__main__":
    serve(set_up)
