"""Host memory as TensorRT would hand it to a plugin: bare addresses, and around each tensor bytes that nobody may touch."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trt_kv.opspec import OpSpec
from trt_kv.plugins.cases import POISON

GUARD_BYTES = 256
GUARD = 0xA5


class GuardedBuffers:
    """Named tensors, each in an allocation of its own with a guard before and behind it."""

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}
        self.arrays: dict[str, np.ndarray] = {}

    def add(self, name: str, content: np.ndarray) -> None:
        """Put a copy of ``content`` behind a guard."""
        memory = np.full(content.nbytes + 2 * GUARD_BYTES, GUARD, np.uint8)
        array = memory[GUARD_BYTES : GUARD_BYTES + content.nbytes].view(content.dtype).reshape(content.shape)
        array[...] = content
        self._memory[name], self.arrays[name] = memory, array

    def address(self, name: str) -> int:
        return int(self.arrays[name].ctypes.data)

    def check_guards(self) -> None:
        for name, memory in self._memory.items():
            outside = np.concatenate([memory[:GUARD_BYTES], memory[-GUARD_BYTES:]])
            assert (outside == GUARD).all(), f"something wrote outside {name}"


def output_shapes(spec: OpSpec, inputs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of each output of the node, states included, by the axes of the spec."""
    sizes = {axis: n for t in spec.inputs if t.name in inputs for axis, n in zip(t.axes, inputs[t.name].shape, strict=True)}
    shapes = {t.name: tuple(sizes[axis] for axis in t.axes) for t in spec.outputs}
    return shapes | {f"{state.name}_out": inputs[state.name].shape for state in spec.states}


def poisoned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """What an output holds before the op: nothing that may be read."""
    return np.full(shape, np.nan if dtype.kind == "f" else POISON, dtype)


def padded(inputs: Mapping[str, Any], *, n_tokens: int, n_sequences: int) -> dict[str, Any]:
    """The same step with ``n_tokens`` rows behind the last token and ``n_sequences`` empty sequences behind the last one.

    The rows write to a page that no sequence owns, as a runtime does that pads steps to a fixed shape.
    """
    spare = np.setdiff1d(np.arange(len(inputs["kv"])), inputs["page_table"])[0]
    page_size = inputs["kv"].shape[3]
    fills: dict[str, tuple[int, int, float]] = {
        **dict.fromkeys(("q", "k", "v", "lse"), (0, n_tokens, np.nan)),
        "positions": (0, n_tokens, POISON),
        "prompt_remaining": (0, n_tokens, POISON),
        "slots": (1, n_tokens, spare * page_size),
        "kv_len": (1, n_sequences, 0),
        "page_table": (1, n_sequences, -1),
        "evict": (0, n_sequences, 0),
        "budget": (0, n_sequences, POISON),
        "prompt_len": (0, n_sequences, POISON),
        "adaptive_budget": (1, n_sequences, POISON),
        "query_rows": (1, n_sequences, POISON),
    }
    result = dict(inputs)
    for name, (axis, count, fill) in fills.items():
        if name in inputs:
            widths = [(0, count if i == axis else 0) for i in range(inputs[name].ndim)]
            result[name] = np.pad(inputs[name], widths, constant_values=fill)
    if "cu_tokens" in inputs:
        result["cu_tokens"] = np.pad(inputs["cu_tokens"], (0, n_sequences), mode="edge")
    return result


def padding_slots(inputs: Mapping[str, Any], step: Mapping[str, Any], *, n_tokens: int) -> np.ndarray:
    """[M, P] bool: where the ``n_tokens`` rows of padding write in ``step``, made from ``inputs`` by ``padded``."""
    n_pages, page_size = inputs["kv"].shape[0], inputs["kv"].shape[3]
    written = np.zeros((n_pages, page_size), bool)
    if "slots" in step:
        written[np.divmod(step["slots"][inputs["layer"], -n_tokens:], page_size)] = True
    return written
