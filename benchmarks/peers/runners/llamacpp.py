"""llama.cpp, through the wheel xllamacpp. Options: ``vocab_size``."""

import importlib.metadata

import xllamacpp

from benchmarks.peers.protocol import Answer, Job, Setup, prompt_ids
from benchmarks.peers.serving import CannotDoError, Clock, Run, serve


def set_up(setup: Setup) -> tuple[dict[str, object], Run]:
    """See ``benchmarks.peers.serving.serve``."""
    params = xllamacpp.CommonParams()
    params.model.path = setup.model
    params.n_ctx = setup.context
    params.n_parallel = 1
    params.cpuparams.n_threads = setup.threads
    params.cpuparams_batch.n_threads = setup.threads
    params.cache_ram_mib = 0
    params.verbosity = 0
    server = xllamacpp.Server(params)
    vocab_size = setup.options["vocab_size"]

    def run(job: Job) -> Answer:
        clock = Clock()
        errors: list[object] = []

        def on_part(part: dict[str, object]) -> None:
            if "choices" not in part:
                errors.append(part)
            elif len(pieces) <= job.n_tokens:  # the last part says why the text ended
                pieces.append(part)
                clock.token()

        pieces: list[object] = []
        request = {"prompt": prompt_ids(job, vocab_size), "n_predict": job.n_tokens + 1, "temperature": 0.0}
        server.handle_completions(request | {"ignore_eos": True, "cache_prompt": False, "stream": True}, on_part)
        if errors:
            raise CannotDoError(str(errors[0])[:300])
        return clock.answer()

    return {"version": importlib.metadata.version("xllamacpp")}, run


if __name__ == "__main__":
    serve(set_up)
