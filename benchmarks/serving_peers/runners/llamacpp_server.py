"""llama.cpp's HTTP server, through the wheel xllamacpp: ``... llamacpp_server FILE.gguf JSON``, until standard input ends.

Fields of the JSON object: ``n_parallel`` sequences, ``n_ctx`` tokens for all of them together, ``threads``, and ``q8_0``: the
cache in 8 bits in place of 16.
"""

import json
import sys

import xllamacpp


def main(model: str, options: str) -> None:
    """Serve the file, and say where."""
    given = json.loads(options)
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.n_parallel = given["n_parallel"]
    params.n_ctx = given["n_ctx"]
    params.cpuparams.n_threads = given["threads"]
    params.cpuparams_batch.n_threads = given["threads"]
    params.cache_ram_mib = 0
    params.verbosity = 0
    if given["q8_0"]:
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_Q8_0
    server = xllamacpp.Server(params)
    print(f"serving at {server.listening_address}", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
