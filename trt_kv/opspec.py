"""OpSpec: everything about a custom op that is data. Schemas, docs, cases and tolerances are derived from it.

Axis letters: N tokens of this step over all sequences, B sequences, H query heads, K KV heads, D head size, P page size,
M pages in the pool, T pages a page table can name, L layers, U queries that the runtime stores, S rows of a page's
summary. ``B+1`` is one more than B.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

DOMAIN = "trt_kv"
OP_VERSION = 1

PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(OP_VERSION)}
"""On every node beside the spec's attributes: TensorRT looks its plugin up by these. Other runtimes ignore them."""

DType = Literal["float", "float32", "int64"]
AttributeType = Literal["int", "float", "string", "floats"]
"""``floats``: a table of the policy for the node's layer, a tuple of fp32 numbers."""
AttributeValue = int | float | str | tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output. ``dtype`` "float" is the engine's compute type; ``state`` is read and updated in place.

    On the CPU ``kv`` and ``summaries`` hold rows of the type of the KV cache in place of D numbers (``plugins/kv_rows.py``).
    """

    name: str
    axes: tuple[str, ...]
    dtype: DType
    doc: str
    state: bool = False
    optional: bool = False


@dataclass(frozen=True, kw_only=True)
class AttributeSpec:
    """One attribute; ``default`` None means that every node must carry it."""

    name: str
    type: AttributeType
    doc: str
    default: AttributeValue | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One test case of an op: ``cached`` tokens and ``new`` tokens of each sequence, and the sizes of the free dimensions.

    ``values`` sets the inputs that the case tests; all others are drawn at random. ``own_tokens``: each KV head holds
    its own cached tokens, in its own order, as after an eviction that ranks per head; otherwise all heads hold the same ones.
    ``in_order``: nothing has ever been evicted, and a sequence's tokens lie in its pages in order of position.
    """

    name: str
    cached: tuple[int, ...]
    new: tuple[int, ...]
    dims: Mapping[str, int]
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)
    values: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    own_tokens: bool = False
    in_order: bool = False


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a kernel may be from the fp32 reference, and why."""

    atol: float
    rtol: float
    reason: str


@dataclass(frozen=True, kw_only=True)
class OpSpec:
    """The specification of one op in domain ``trt_kv``. Updated state tensors are outputs named as the input plus ``_out``."""

    name: str
    summary: str
    source: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    attributes: tuple[AttributeSpec, ...]
    cases: tuple[Case, ...]
    tolerance: Tolerance

    @property
    def folder(self) -> str:
        """The op's folder in ``plugins``: CachedAttention -> cached_attention."""
        return "".join("_" + c.lower() if c.isupper() else c for c in self.name).lstrip("_")

    @property
    def states(self) -> tuple[TensorSpec, ...]:
        return tuple(tensor for tensor in self.inputs if tensor.state)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the node's outputs: results first, then the updated states."""
        return tuple(t.name for t in self.outputs) + tuple(f"{t.name}_out" for t in self.states)
