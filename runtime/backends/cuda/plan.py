"""Memory of an engine on a device, planned before the first step from the requested sizes and the free memory.

Unless sizes are given, half of the free device memory is for the cache or its working sets; the rest is left to the steps.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from trt_kv.errors import CapacityError, UsageError, load_option
from trt_kv.kv_memory import kv_bytes, token_bytes
from trt_kv.manifest import Manifest
from trt_kv.plugins.recall_attention.page_counts import most_rows
from trt_kv.program import recalling_layers
from trt_kv.runtime.arguments import is_integer
from trt_kv.runtime.backends.cuda.recall.driver import RecallCapacity
from trt_kv.runtime.backends.cuda.recall.working_set import BlockSizes
from trt_kv.runtime.backends.cuda.step_buffers import StepSizes
from trt_kv.runtime.reservation import window_pages

DEFAULT_BATCH = 8
COPIES = 2
"""Working sets per sequence of the largest batch: an evaluation continues each sequence twice."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """Requested sizes; None: as large as the model allows, or as fits.

    ``batch``: sequences that decode together. ``context_tokens``: the most tokens of one of them. ``cache_tokens``,
    ``host_tokens``: tokens in every layer, on the device and on the host; ``most_cache_tokens`` bounds the former.
    """

    chunk: int
    batch: int
    context_tokens: int | None = None
    cache_tokens: int | None = None
    most_cache_tokens: int | None = None
    host_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not is_integer(value, 1):
                raise UsageError(f"bad {name}", got=repr(value), expected="an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class DevicePlan:
    """``largest``: the largest step. ``n_pages``: pages of the pool on the device. ``most``: of each layer whose cache is in
    it, the pages that it adds at most. ``recall``: None if no layer recalls.
    """

    largest: StepSizes
    n_pages: int
    most: tuple[int, ...]
    recall: RecallCapacity | None = None


def device_plan(manifest: Manifest, wanted: Wanted, *, dtype: str, free_device: int, free_host: int) -> DevicePlan:
    """Divide ``free_device`` and ``free_host`` bytes; keys and values are stored as ``dtype``.

    ``CapacityError`` if not even one working set fits, ``UsageError`` for budgets that recall on a device does not support.
    """
    config, size = manifest.config, manifest.page_size
    context = min(config.max_positions, wanted.context_tokens or config.max_positions)
    n_tokens = max(wanted.chunk, wanted.batch)
    width = max(min(_pages(context, size), window_pages(window, wanted.chunk, size)) for window in manifest.windows)
    largest = StepSizes(n_tokens=n_tokens, n_rows=n_tokens, n_sequences=wanted.batch, table_width=width)
    most = min(COPIES * wanted.batch * context, wanted.most_cache_tokens or COPIES * wanted.batch * context)
    of_token = token_bytes(config, dtype)
    recalling_numbers = recalling_layers(manifest.programs["decode"])
    windows = [window for layer, window in enumerate(manifest.windows) if layer not in recalling_numbers]
    recalling, whole = len(recalling_numbers), len(windows)
    most_pages = tuple(COPIES * wanted.batch * window_pages(window, wanted.chunk, size) for window in windows)

    def pages_for(tokens: int) -> int:
        """Pages for ``tokens`` in each layer that does not recall, but of a window no more than all sequences can hold."""
        return sum(min(_pages(tokens, size), limit) for limit in most_pages)

    def whole_pages(n_bytes: int) -> int:
        if wanted.cache_tokens is not None or not any(windows):
            tokens = wanted.cache_tokens or n_bytes // (whole * of_token)
            return pages_for(max(1, min(most, tokens)))
        return pages_for(_largest(most, lambda tokens: pages_for(tokens) * size * of_token <= n_bytes))

    if not recalling:
        n_pages = whole_pages(free_device // 2)
        return DevicePlan(largest=largest, n_pages=n_pages, most=most_pages)
    page_bytes = size * kv_bytes(config, dtype)
    host_tokens = wanted.host_tokens or max(
        1, min(COPIES * config.max_positions, free_host // 2 * size // (recalling * page_bytes))
    )
    host_pages = recalling * _pages(host_tokens, size)
    # Layers that do not recall get the memory they would have if no layer recalled; the others share the rest.
    n_pages = whole_pages(free_device // 2 * whole // config.n_layers) if whole else 0
    summaries = host_pages * page_bytes // (2 * size) * most_rows(manifest.programs["decode"], size, dtype)
    free = max(0, free_device // 2 - n_pages * size * of_token - summaries)
    if wanted.cache_tokens is not None:
        free = recalling * _pages(wanted.cache_tokens, size) * page_bytes
    capacity = RecallCapacity(
        host_pages=host_pages,
        sequences=COPIES * wanted.batch,
        longest_prompt=min(context, host_tokens),
        largest_chunk=wanted.chunk,
    )
    return DevicePlan(
        largest=largest,
        n_pages=n_pages,
        most=most_pages,
        recall=_fitting(manifest, capacity, free // (recalling * page_bytes)),
    )


def _fitting(manifest: Manifest, capacity: RecallCapacity, n_pages: int) -> RecallCapacity:
    """``capacity``, reduced to what fits into working sets of ``n_pages`` pages per layer: first the longest prompt, until one
    working set fits, then the number of sequences. ``CapacityError`` if not even a working set for one token fits.
    """

    def block_pages(longest_prompt: int) -> int:
        return BlockSizes.of(manifest.programs["prefill"], longest_prompt).n_pages

    if block_pages(1) > n_pages:
        raise CapacityError(
            "the device has too little memory for one working set",
            got=f"room for {n_pages * manifest.page_size} tokens per layer",
            expected=f"room for {block_pages(1) * manifest.page_size}",
            fix=f"raise {load_option('cache_tokens')}, free memory of the device, or build with a smaller budget",
        )
    longest = _largest(capacity.longest_prompt, lambda prompt: block_pages(prompt) <= n_pages)
    sequences = min(capacity.sequences, n_pages // block_pages(longest))
    return dataclasses.replace(capacity, longest_prompt=longest, sequences=sequences)


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number from 1 to ``most`` that fits, by bisection: 1 must fit, and every number below one that fits."""
    low, high = 1, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _pages(n_tokens: int, page_size: int) -> int:
    return -(-n_tokens // page_size)
