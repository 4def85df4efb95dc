"""Device resources that requests need in addition to pool pages: step buffers and working sets."""

from collections.abc import Callable, Sequence

from trt_kv.errors import CapacityError, load_option
from trt_kv.runtime.backends.cuda.plan import COPIES
from trt_kv.runtime.backends.cuda.recall.working_set import DeviceSets
from trt_kv.runtime.backends.cuda.step_buffers import StepSizes
from trt_kv.runtime.reservation import RequestSize


class LargestStep:
    """A ``Limit`` on the length of sequences: step buffers and working sets have fixed sizes."""

    def __init__(
        self,
        largest: StepSizes,
        *,
        page_size: int,
        most_held: Callable[[RequestSize], int] = lambda size: size.n_prompt + max(0, size.max_new_tokens - 1),
        longest_prompt: int | None = None,
        how_to_enlarge: str = "load the engine with a profile for a longer context",
    ) -> None:
        """``most_held``: the most tokens of a request that any layer holds. ``longest_prompt``: tokens of the longest prompt
        that working sets were sized for; None: there are none. ``how_to_enlarge``: the fix in the error for longer sequences.
        """
        self._how_to_enlarge = how_to_enlarge
        self._longest = largest.table_width * page_size
        self._most_held = most_held
        self._longest_prompt = longest_prompt

    def check(self, size: RequestSize) -> None:
        """See ``Limit``."""
        if self._most_held(size) > self._longest:
            raise CapacityError(
                "the request is longer than this engine was loaded for",
                got=f"{size.n_prompt} prompt tokens, {size.max_new_tokens} to generate",
                expected=f"at most {self._longest} prompt tokens, and at most {self._longest} kept and generated ones together",
                fix=f"shorten it, or {self._how_to_enlarge}",
            )
        if self._longest_prompt is not None and size.n_prompt > self._longest_prompt:
            raise CapacityError(
                "the prompt is longer than working sets on the device were planned for",
                got=f"{size.n_prompt} tokens",
                expected=f"at most {self._longest_prompt}",
                fix=f"shorten it, or raise {load_option('cache_tokens')} and {load_option('host_tokens')}",
            )


class WorkingSetBlocks:
    """A ``Resource``: working sets on the device. Each recalling layer of a sequence needs one block; all have one size."""

    name = "working sets"

    def __init__(self, sets: DeviceSets, *, layers: Sequence[int], n_blocks: int, block_pages: int) -> None:
        """``block_pages``: size of a block for the longest prompt; the blocks of ``sets`` are smaller if memory is short."""
        self._sets = sets
        self._layers = layers
        self.total = n_blocks
        self._block_pages = block_pages

    def while_reading(self, size: RequestSize) -> int:
        return self.after_reading(size)

    def after_reading(self, size: RequestSize) -> int:
        return size.n_sequences * len(self._layers)

    def secure(self, reserved: int) -> None:
        """Blocks are on the device from the start."""

    def refusal(self, needed: int) -> CapacityError:
        n_layers = len(self._layers)
        enough = -(-needed // n_layers)
        option = load_option("cache_tokens", enough * self._block_pages * self._sets.host.page_size)
        return CapacityError(
            "the device has too few working sets for this request",
            got=f"room for {self.total // n_layers} sequences",
            expected=f"room for {enough}",
            fix=f"load the engine with {option} and batch={-(-enough // COPIES)} or more",
        )
