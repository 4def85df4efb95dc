"""A request of our own engine, timed."""

from itertools import pairwise

import numpy as np

from benchmarks.peers.protocol import Answer, Job, prompt_ids
from benchmarks.peers.serving import joules
from benchmarks.speed.recall_cache import limits_of
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.in_place import RecallInPlace
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.engine import Engine
from trt_kv.runtime.request import Request


def request_of(engine: Engine, job: Job) -> Answer:
    """A request as any client sends it."""
    request = submitted(engine, prompt_ids(job, engine.manifest.config.vocab_size), job.n_tokens)
    engine.core.wait(lambda: bool(request.times.tokens) or request.is_finished)
    return answer_of(engine, request, job.n_tokens, skip=0)


def submitted(engine: Engine, prompt: list[int], n_tokens: int) -> Request:
    """A greedy request for the first token, ``n_tokens`` timed ones, and one more: what it holds lasts as long as it does."""
    return engine.submit(prompt, max_new_tokens=n_tokens + 2, temperature=0.0, ignore_eos=True)


def answer_of(engine: Engine, request: Request, n_tokens: int, *, skip: int) -> Answer:
    """Let the request generate ``skip`` tokens after its first one, and time ``n_tokens`` further ones."""
    engine.core.wait(lambda: len(request.times.tokens) > skip or request.is_finished)
    before = joules()
    engine.core.wait(lambda: len(request.times.tokens) > skip + n_tokens or request.is_finished)
    after = joules()
    kv_bytes = None if request.held_sequence is None else read_bytes(engine, request.held_sequence)
    engine.core.wait(lambda: request.is_finished)
    if request.error is not None:
        raise request.error
    tokens = request.times.tokens[skip : skip + n_tokens + 1]
    return Answer(
        first_token_s=request.times.to_first_token_s,
        token_ms=[1e3 * (b - a) for a, b in pairwise(tokens)],
        kv_bytes=kv_bytes,
        joules=None if before is None or after is None else after - before,
    )


def read_bytes(engine: Engine, sequence: SequenceCache) -> int:
    """Bytes of keys, values and summaries that the sequence's next step reads."""
    row_bytes = engine.runner.pool.kv[0, 0, 0, 0].nbytes
    held, policy, tiers = sequence.held_tokens, engine.manifest.applied_policy, engine.runner.tiers
    if policy.recalls and policy.budget == "constant":
        limits = limits_of(policy, engine.manifest.page_size)
        n_pages = limits.n_sinks + limits.n_newest + limits.n_chosen(policy.tokens)
        held = np.minimum(held, n_pages * engine.manifest.page_size)
    n_bytes = int(held.sum()) * engine.manifest.config.n_kv_heads * 2 * int(row_bytes)
    return n_bytes + (tiers.used_bytes["summaries"] if isinstance(tiers, StreamedRecall | RecallInPlace) else 0)
