"""What answers to calibration prompts attend to, by KV head, for recipes with a budget for each head (LU-KV)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from trt_kv.chat.turns import text_end_ids
from trt_kv.pipeline.calibration_runs import decoder_for, programs_for, scoring_policy
from trt_kv.pipeline.continuation import continue_greedily
from trt_kv.pipeline.plans import DEFAULT_PAGE_SIZE
from trt_kv.policy import Policy
from trt_kv.program import OpNode, Program

if TYPE_CHECKING:
    import numpy as np

    from trt_kv.calibration.lukv import Usefulness, UsefulnessOf
    from trt_kv.export.checkpoints.base import Checkpoint
    from trt_kv.runtime.backends.host.store import HostKvPool
    from trt_kv.runtime.model_runner import ModelRunner

ANSWER_TOKENS = 64
"""As many as LU-KV's released code samples for a question."""


def usefulness_of(checkpoint: "Checkpoint", policy: Policy, max_tokens: int) -> "UsefulnessOf":
    """A function that continues prompts of up to ``max_tokens`` greedily by ``ANSWER_TOKENS``, or to the end of the text.

    Ranking: that of ``policy``. Use: the largest attention weight that a query of the answer, except the
    prompt's own, gives a token in any query head of the KV head, times the norm of the token's value, of which those of a layer
    add up to 1. LU-KV takes the norm after the output projection.
    """
    from trt_kv.calibration.lukv import Usefulness
    from trt_kv.runtime.backends.host.runner import host_runner
    from trt_kv.runtime.backends.host.store import HostKvPool
    from trt_kv.runtime.backends.host.torch_decoder import TorchDecoderExecutor

    config = checkpoint.config
    longest = min(max_tokens + ANSWER_TOKENS, config.max_positions)
    pool = HostKvPool(
        n_pages=config.n_layers * -(-longest // DEFAULT_PAGE_SIZE),
        page_size=DEFAULT_PAGE_SIZE,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
    )
    dense = TorchDecoderExecutor(decoder_for(checkpoint))
    whole = Policy(name="whole", summary="")
    answering = host_runner(dense, pool, programs_for(checkpoint, whole, DEFAULT_PAGE_SIZE))
    ranking = host_runner(dense, pool, programs_for(checkpoint, scoring_policy(policy), DEFAULT_PAGE_SIZE))
    end_ids = text_end_ids(checkpoint.eos_token_ids, checkpoint.tokenizer_files, vocab_size=config.vocab_size)

    def of(token_ids: Sequence[int]) -> "Usefulness":
        n_steps = min(ANSWER_TOKENS, config.max_positions - len(token_ids))
        answer = continue_greedily(answering, token_ids, n_steps, end_ids)
        scoring = host_runner(dense, pool, largest_weights(checkpoint, max(1, len(answer))))
        use = _use(scoring, pool, [*token_ids, *answer])[:, :, : len(token_ids)]
        return Usefulness(ranking=ranking.importance(token_ids), use=use)

    return of


def largest_weights(checkpoint: "Checkpoint", n_queries: int) -> Mapping[str, Program]:
    """Programs that score tokens by the largest weight that any of the last queries gives them, for each KV head."""
    score = Policy(name="use", summary="", score="window", budget="uniform", window=n_queries, heads="each")

    def with_maxima(node: OpNode) -> OpNode:
        if node.op != "TokenScores":
            return node
        return dataclasses.replace(node, attributes={**node.attributes, "maximum": 1})

    return {
        phase: tuple(tuple(map(with_maxima, nodes)) for nodes in program)
        for phase, program in programs_for(checkpoint, score, DEFAULT_PAGE_SIZE).items()
    }


def _use(runner: "ModelRunner", pool: "HostKvPool", token_ids: Sequence[int]) -> "np.ndarray[Any, Any]":
    """[L, K, N] of the layers without an attention window."""
    import numpy as np

    from trt_kv.plugins.paging import gather_kv, pages_of

    sequence = runner.new_sequence()
    try:
        runner.prefill(sequence, token_ids, evict=False)
        weights = runner.scores(sequence)
        norms = []
        for layer in runner.whole_layers:
            pages = pages_of(sequence.page_table[:, None], layer, 0, len(token_ids), pool.page_size)
            _, v_KND = gather_kv(pool.kv, pages, len(token_ids))
            norms_KN = np.linalg.norm(v_KND.astype(np.float64), axis=2)
            norms.append(norms_KN / max(float(norms_KN.sum()), 1e-300))
        use_LKN: np.ndarray[Any, Any] = weights * np.stack(norms)
        return use_LKN
    finally:
        sequence.release()
