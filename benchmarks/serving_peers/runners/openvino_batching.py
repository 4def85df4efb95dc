"""OpenVINO GenAI's continuous batching, without its prefix cache.

Options: ``n_sequences`` at once; ``chunk``: tokens of a step; ``cache_bytes`` of its KV cache, and ``block_bytes`` of a block;
``evict``: its own eviction, to so many tokens of a sequence.
"""

from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.peers.protocol import Setup
from benchmarks.peers.serving import CannotDoError, serve
from benchmarks.serving_peers.loads import Load, Served, closed_loop

BLOCK = 32
"""Tokens of a block of its cache on a CPU."""


def _scheduler(options: dict[str, Any]) -> Any:
    config = genai.SchedulerConfig()
    config.enable_prefix_caching = False
    config.max_num_seqs = options["n_sequences"]
    config.max_num_batched_tokens = options["chunk"]
    config.num_kv_blocks = options["cache_bytes"] // options["block_bytes"]
    if (evict := options.get("evict")) is not None:
        config.use_cache_eviction = True
        config.cache_eviction_config = genai.CacheEvictionConfig(
            start_size=BLOCK,
            recent_size=4 * BLOCK,
            max_cache_size=max(evict // BLOCK, 6) * BLOCK,
            aggregation_mode=genai.AggregationMode.NORM_SUM,
        )
    return config


def set_up(setup: Setup) -> tuple[dict[str, object], Any]:
    """See ``benchmarks.peers.serving.serve``."""
    scheduler = _scheduler(setup.options)
    threads = {"INFERENCE_NUM_THREADS": setup.threads}
    pipeline = genai.ContinuousBatchingPipeline(setup.model, scheduler, "CPU", threads)
    allowed, taken = setup.options["cache_bytes"], 0
    n_asked = 0

    def run(load: Load) -> Served:
        nonlocal n_asked, taken
        config = genai.GenerationConfig()
        config.max_new_tokens = load.n_tokens
        config.ignore_eos = True
        config.do_sample = False
        handles: list[Any] = []

        def begin(at: int) -> None:
            nonlocal n_asked
            ids = ov.Tensor(np.array([load.prompts[at]], np.int64))
            handles.append(pipeline.add_request(n_asked, ids, config))
            n_asked += 1

        def step() -> list[tuple[int, list[int]]]:
            pipeline.step()
            found = []
            for at, handle in enumerate(handles):
                while handle.can_read():
                    found += [(at, [int(one) for one in output.generated_ids]) for output in handle.read().values()]
                if str(handle.get_status()).endswith("IGNORED"):
                    raise CannotDoError("a request does not fit into the cache, and is ignored")
            return found

        served = closed_loop(load, begin, step)
        taken = max(taken, pipeline.get_metrics().kv_cache_size_in_bytes)
        if taken > allowed:
            raise CannotDoError(f"its KV cache has {taken} bytes, more than {allowed}")
        return served

    return {"version": genai.__version__, "blocks": scheduler.num_kv_blocks}, run


if __name__ == "__main__":
    serve(set_up, Load)
