"""Features of tokens and what a repetition of the text attends to, for recipes whose scores are predicted (KVzap)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from trt_kv.errors import CheckpointError
from trt_kv.pipeline.calibration_heads import largest_weights
from trt_kv.pipeline.calibration_runs import decoder_for, programs_for
from trt_kv.pipeline.callbacks import OnNote
from trt_kv.pipeline.plans import DEFAULT_PAGE_SIZE
from trt_kv.policy import Policy

if TYPE_CHECKING:
    import numpy as np

    from trt_kv.calibration.kvzap import TokensOf
    from trt_kv.export.checkpoints.base import Checkpoint
    from trt_kv.runtime.backends.host.store import HostKvPool
    from trt_kv.runtime.model_runner import ModelRunner

REPEAT = "\n\nRepeat the previous text exactly.\n\n"
"""Between a prompt and its repetition."""


def tokens_of(checkpoint: "Checkpoint", max_tokens: int, on_note: OnNote) -> "TokensOf":
    """A function for prompts of up to ``max_tokens``, of which the beginning counts if two of them do not fit into the model.

    The decoder reads a prompt, ``REPEAT`` and the prompt again; the use of a token is the largest attention weight that any
    query of the repetition gives it in any query head of the KV head, times the norm of its value after the output projection.
    """
    from trt_kv.calibration.kvzap import Tokens
    from trt_kv.plugins.predicted_scores.frequencies import key_frequencies
    from trt_kv.runtime.backends.host.runner import host_runner
    from trt_kv.runtime.backends.host.store import HostKvPool
    from trt_kv.runtime.backends.host.torch_decoder import TorchDecoderExecutor
    from trt_kv.runtime.text.tokenizer import load_tokenizer

    config = checkpoint.config
    between = load_tokenizer(checkpoint.tokenizer_file, error=CheckpointError).encode(REPEAT, add_special_tokens=False).ids
    most = max(1, (config.max_positions - len(between)) // 2)
    if max_tokens > most:
        on_note(f"note: of longer calibration prompts the first {most} tokens count, so that a repetition fits into the model")
    n_tokens = 2 * min(max_tokens, most) + len(between)
    pool = HostKvPool(
        n_pages=config.n_layers * -(-n_tokens // DEFAULT_PAGE_SIZE),
        page_size=DEFAULT_PAGE_SIZE,
        n_kv_heads=config.n_kv_heads,
        head_size=config.head_dim,
    )
    dense = TorchDecoderExecutor(decoder_for(checkpoint))
    reading = host_runner(dense, pool, programs_for(checkpoint, Policy(name="whole", summary=""), DEFAULT_PAGE_SIZE))
    projections, frequencies = _projections(checkpoint, reading.whole_layers), key_frequencies(config)

    def of(token_ids: Sequence[int], with_use: bool) -> "Tokens":
        import numpy as np

        ids = list(token_ids[:most])
        runner = host_runner(dense, pool, largest_weights(checkpoint, len(ids))) if with_use else reading
        sequence = runner.new_sequence()
        try:
            runner.prefill(sequence, [*ids, *between, *ids] if with_use else ids, evict=False)
            features, values = _read(runner, pool, sequence, len(ids), frequencies)
            if not with_use:
                return Tokens(features=features, use=np.zeros(features.shape[:3], np.float32))
            weights_LKN = runner.scores(sequence)[:, :, : len(ids)]
        finally:
            sequence.release()
        norms = np.sqrt(np.maximum(np.einsum("lknd,lkde,lkne->lkn", values, projections, values, optimize=True), 0.0))
        return Tokens(features=features, use=(weights_LKN * norms).astype(np.float32))

    return of


def _read(
    runner: "ModelRunner", pool: "HostKvPool", sequence: Any, n_tokens: int, frequencies: Sequence[tuple[float, ...]]
) -> "tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]":
    """Features [L, K, N, F], as PredictedScores reads them, and values [L, K, N, D] of the first ``n_tokens``, of layers
    without an attention window.
    """
    import numpy as np

    from trt_kv.plugins.paging import gather_kv, pages_of
    from trt_kv.plugins.predicted_scores.features import features_of

    features, values = [], []
    for layer in runner.whole_layers:
        pages = pages_of(sequence.page_table[:, None], layer, 0, n_tokens, pool.page_size)
        k_KND, v_KND = gather_kv(pool.kv, pages, n_tokens)
        features.append(features_of(k_KND, v_KND, np.arange(n_tokens), frequencies[layer]))
        values.append(v_KND)
    return np.stack(features), np.stack(values)


def _projections(checkpoint: "Checkpoint", layers: Sequence[int]) -> "np.ndarray[Any, Any]":
    """[L, K, D, D]: v' P v is the mean over the KV head's query heads of the squared norm of v after the output projection."""
    import numpy as np

    config = checkpoint.config
    found = []
    for layer in layers:
        o_XHD = checkpoint.tensor(f"model.layers.{layer}.self_attn.o_proj.weight").float().numpy()
        o_XKGD = o_XHD.reshape(len(o_XHD), config.n_kv_heads, config.group_size, config.head_dim)
        found.append(np.einsum("xkgd,xkge->kde", o_XKGD, o_XKGD, optimize=True) / config.group_size)
    return np.stack(found)
