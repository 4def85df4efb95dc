"""What requests need of a device beside pages of pools: places in a step, and working sets."""

from collections.abc import Callable, Sequence

from trt_kv.errors import CapacityError
from trt_kv.runtime.backends.cuda.plan import COPIES
from trt_kv.runtime.backends.cuda.recall.working_set import DeviceSets
from trt_kv.runtime.backends.cuda.step_buffers import StepSizes
from trt_kv.runtime.request import Request


class LargestStep:
    """Buffers are sized once: how many sequences decode together, and how long one may become."""

    def __init__(
        self,
        largest: StepSizes,
        *,
        page_size: int,
        kept: Callable[[int], int] = lambda n_prompt: n_prompt,
        longest_prompt: int | None = None,
    ) -> None:
        """``kept``: how many tokens of a prompt a layer keeps at most once it has been read. ``longest_prompt``: what working
        sets were sized for; None: where there are none.
        """
        self._n_sequences = largest.n_sequences
        self._longest = largest.table_width * page_size
        self._kept = kept
        self._longest_prompt = longest_prompt

    def check(self, requests: Sequence[Request]) -> None:
        """See ``Limit``."""
        if len(requests) > self._n_sequences:
            raise CapacityError(
                "more prompts at once than this engine was loaded for",
                got=f"{len(requests)} prompts",
                expected=f"at most {self._n_sequences}",
                fix=f"send fewer at once, or load the engine with batch={len(requests)}",
            )
        for request in requests:
            n_prompt = len(request.prompt_ids)
            n_decoding = self._kept(n_prompt) + request.limit - 1  # nothing attends to the last one
            if max(n_prompt, n_decoding) > self._longest:
                raise CapacityError(
                    "the request is longer than this engine was loaded for",
                    got=f"{n_prompt} prompt tokens, {request.limit} to generate",
                    expected=f"at most {self._longest} together, of the prompt what is kept; and no longer prompt",
                    fix="shorten it, or load the engine with a profile of a longer context",
                )
            if self._longest_prompt is not None and n_prompt > self._longest_prompt:
                raise CapacityError(
                    "the prompt is longer than working sets on the device were planned for",
                    got=f"{n_prompt} tokens",
                    expected=f"at most {self._longest_prompt}",
                    fix="shorten it, or load the engine with more cache_tokens and host_tokens",
                )


class BlockDemand:
    """Working sets on the device: a block of pages for each recalling layer of each sequence, all of one size."""

    def __init__(self, sets: DeviceSets, *, layers: Sequence[int], n_blocks: int, block_pages: int) -> None:
        """``block_pages``: of a block where there is memory for the longest prompt; those of ``sets`` may be smaller."""
        self._sets = sets
        self._layers = layers
        self._n_blocks = n_blocks
        self._block_pages = block_pages

    @property
    def n_free(self) -> int:
        return self._sets.n_free

    def needed(self, requests: Sequence[Request]) -> int:
        return len(requests) * len(self._layers)

    def owned(self, requests: Sequence[Request]) -> int:
        rows = [int(request.sequence.page_table[layer, 0]) for request in requests for layer in self._layers]
        return sum(self._sets.get(row) is not None for row in rows)

    def refusal(self, needed: int, available: int) -> CapacityError:
        n_layers = len(self._layers)
        enough = -(-(self._n_blocks + needed - available) // n_layers)
        block_tokens = self._block_pages * self._sets.host.page_size
        return CapacityError(
            "the device has too few working sets for this request",
            got=f"room for {available // n_layers} more sequences",
            expected=f"room for {needed // n_layers}",
            fix=f"send fewer prompts at once, or load the engine with cache_tokens={enough * block_tokens} and "
            f"batch={-(-enough // COPIES)} or more",
        )
