"""The lines after a generated text: what was held, attended to and recalled."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from trt_kv.manifest import Manifest
from trt_kv.plugins.recall_attention.page_counts import PageLimits

if TYPE_CHECKING:
    from trt_kv.runtime.generation import Generation
    from trt_kv.runtime.statistics import RecallStatistics

_MOST_DECIMALS = 3


def held_notes(manifest: Manifest, result: "Generation") -> list[str]:
    """``held_note`` of each sample."""
    if not result.others:
        return [held_note(manifest, result)]
    return [f"sample {i}: {held_note(manifest, one)}" for i, one in enumerate(result.samples, start=1)]


def prefix_note(result: "Generation") -> str:
    """How much of the prompt was not computed, and how long the first token took."""
    seconds = result.times.to_first_token_s
    told = "" if seconds is None else f"; first token after {seconds:.2f} s"
    return f"[{result.n_cached_tokens} of {result.n_prompt_tokens} prompt tokens from the prefix cache{told}]"


def held_note(manifest: Manifest, result: "Generation") -> str:
    """Lengths, and how much of the cache was held; of a cache on the host, what a step attends to."""
    begin = f"{result.n_prompt_tokens} prompt tokens, {len(result.token_ids)} generated, finished: {result.finish_reason}"
    held, seen = _mean(result.kv_tokens), result.num_computed_tokens
    if manifest.applied_policy.recalls:
        return f"[{begin}; {_attended_text(manifest, result)}the device holds {_count(held, seen)}]"
    exempt = manifest.cache_policy.exempt_layers
    others = [n for layer, n in enumerate(result.kv_tokens) if layer not in exempt]
    told = f", {_percent(_mean(others), seen)} without exempt layers" if exempt and others else ""
    what = "per layer" if manifest.heads_apart == 1 else "per KV head"
    return f"[{begin}; KV cache holds {_count(held, seen)} of {seen} tokens {what} ({_percent(held, seen)}{told})]"


def recall_note(manifest: Manifest, result: "Generation", counts: "RecallStatistics") -> str:
    """How much was recalled from the host, if it was copied, and how often KV heads were corrected."""
    seen = result.num_computed_tokens
    attended = attended_tokens(manifest, result.n_prompt_tokens, seen)
    if attended is not None and min(attended) == seen:
        return "[nothing could be recalled: a step attends to all tokens]"
    rates = f"{counts.head_rate:.0%} of KV heads were corrected, in {counts.layer_step_rate:.0%} of all (layer, step) pairs"
    if not counts.pages_written:
        return f"[pages were read where they are; {rates}]"
    moved = counts.moved_bytes / max(1, len(result.token_ids)) / 2**10
    return f"[recalled {moved:.0f} KiB per token from the host; {rates}; waited {counts.waited_ms:.0f} ms for copies]"


def attended_tokens(manifest: Manifest, n_prompt: int, n_tokens: int) -> list[int] | None:
    """The most tokens that a step attends to in each layer of a sequence of ``n_tokens``: whole pages, first and newest ones
    included, which may exceed the policy's budget. None if budgets are computed from the input.
    """
    policy = manifest.applied_policy
    limits = PageLimits(page_size=manifest.page_size, sinks=policy.sinks, recent=policy.recent)
    attended = []
    for budget, tau, window in zip(manifest.budgets, manifest.taus, manifest.windows, strict=True):
        if tau is None:
            attended.append(min(n_tokens, window or n_tokens))
        elif budget is None:
            return None
        else:
            attended.append(min(n_tokens, limits.n_most(budget.of_prompt(n_prompt)) * limits.page_size))
    return attended


def _attended_text(manifest: Manifest, result: "Generation") -> str:
    seen = result.num_computed_tokens
    attended = attended_tokens(manifest, result.n_prompt_tokens, seen)
    if attended is None:
        return f"of {seen} tokens per layer "
    mean = _mean(attended)
    return f"a step attends to at most {_count(mean, seen)} of {seen} tokens per layer ({_percent(mean, seen)}), "


def _count(part: float, whole: float) -> str:
    """``part``, with as many decimals as it takes to differ from ``whole`` if it is less."""
    texts = (f"{part:.{decimals}f}" for decimals in range(_MOST_DECIMALS + 1))
    return next((text for text in texts if part >= whole or float(text) < whole), f"{part}")


def _percent(part: float, whole: float) -> str:
    return f"{_count(100 * part / whole, 100)}%"


def _mean(counts: Sequence[int]) -> float:
    return sum(counts) / len(counts)
