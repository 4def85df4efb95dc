"""What a request used: tokens, and our extension ``kv``, what its KV cache held and recalled."""

from collections.abc import Sequence
from typing import Any

from trt_kv.runtime.generation import Generation


def usage_of(results: Sequence[Generation]) -> dict[str, Any]:
    """Usage of an answer, from the results of all samples of all prompts."""
    prompts = sum(result.n_prompt_tokens for result in results)
    everyone = [sample for result in results for sample in result.samples]
    n_generated = sum(len(sample.token_ids) for sample in everyone)
    return {
        "prompt_tokens": prompts,
        "completion_tokens": n_generated,
        "total_tokens": prompts + n_generated,
        "prompt_tokens_details": {"cached_tokens": sum(result.n_cached_tokens for result in results)},
        "kv": kv_of(everyone),
    }


def kv_of(samples: Sequence[Generation]) -> dict[str, Any]:
    """What the caches of samples held, means over samples.

    ``computed_tokens``: prompt and generated ones that the cache has seen; ``kept_tokens``: those that it holds, on average
    over layers; ``kept_share_per_layer``; ``recalled_bytes``: copied from the host for them; ``correction_rate``: see
    ``RequestRecall``; the last two are None if the cache is not on the host.
    """
    begun = [sample for sample in samples if sample.num_computed_tokens]
    recalls = [sample.recall for sample in begun if sample.recall is not None]
    per_layer = [_mean([float(n) for n in layer]) for layer in zip(*(sample.kv_tokens for sample in begun), strict=True)]
    shares = zip(*([n / sample.num_computed_tokens for n in sample.kv_tokens] for sample in begun), strict=True)
    return {
        "computed_tokens": _mean([float(sample.num_computed_tokens) for sample in begun]),
        "kept_tokens": round(_mean(per_layer), 2),
        "kept_share_per_layer": [round(_mean(layer), 4) for layer in shares],
        "recalled_bytes": sum(recall.moved_bytes for recall in recalls) if recalls else None,
        "correction_rate": round(_mean([recall.correction_rate for recall in recalls]), 6) if recalls else None,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
