"""OpenVINO GenAI: its continuous batching pipeline on a GGUF file or a folder in OpenVINO's format.

Options: ``vocab_size``; ``evict``: its own eviction, by attention scores, to this share of the longest text.
"""

from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai

from benchmarks.peers.protocol import Answer, Job, Setup, prompt_ids
from benchmarks.peers.serving import Clock, Run, serve

BLOCK = 32
"""Tokens of a block of its cache on a CPU."""


class _Tokens(genai.StreamerBase):  # type: ignore[misc]
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def write(self, token: object) -> Any:
        for _ in token if isinstance(token, list) else [token]:
            self._clock.token()
        return genai.StreamingStatus.RUNNING

    def end(self) -> None:
        """Nothing is held back."""


def _scheduler(evict: int | None) -> genai.SchedulerConfig:
    """Without its prefix cache, which no request here could use."""
    config = genai.SchedulerConfig()
    config.enable_prefix_caching = False
    config.max_num_batched_tokens = 2**31 - 1 if evict is None else 512
    if evict is not None:
        config.use_cache_eviction = True
        config.cache_eviction_config = genai.CacheEvictionConfig(
            start_size=BLOCK,
            recent_size=4 * BLOCK,
            max_cache_size=max(evict // BLOCK, 6) * BLOCK,
            aggregation_mode=genai.AggregationMode.NORM_SUM,
        )
    return config


def set_up(setup: Setup) -> tuple[dict[str, object], Run]:
    """See ``benchmarks.peers.serving.serve``."""
    share = setup.options.get("evict")
    evict = None if share is None else int(share * setup.context)
    pipeline = genai.LLMPipeline(
        setup.model, "CPU", INFERENCE_NUM_THREADS=setup.threads, scheduler_config=_scheduler(evict), ATTENTION_BACKEND="PA"
    )
    vocab_size = setup.options["vocab_size"]

    def run(job: Job) -> Answer:
        ids = np.array([prompt_ids(job, vocab_size)], np.int64)
        config = genai.GenerationConfig()
        config.max_new_tokens = job.n_tokens + 1
        config.ignore_eos = True
        config.do_sample = False
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        clock = Clock()
        pipeline.generate(inputs, config, _Tokens(clock))
        return clock.answer()

    return {"version": genai.__version__}, run


if __name__ == "__main__":
    serve(set_up)
