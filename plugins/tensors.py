"""Specs of tensors and attributes that several ops share."""

from typing import TypeVar

from trt_kv.opspec import AttributeSpec, TensorSpec

Array = TypeVar("Array")
"""The type of tensors: numpy arrays on the host, torch tensors on a device."""

Q = TensorSpec(name="q", axes=("N", "H", "D"), dtype="float", doc="queries of this step, rotated")
K = TensorSpec(name="k", axes=("N", "K", "D"), dtype="float", doc="keys of this step, rotated")
V = TensorSpec(name="v", axes=("N", "K", "D"), dtype="float", doc="values of this step")
LSE = TensorSpec(name="lse", axes=("N", "H"), dtype="float32", doc="log of the softmax denominator of each query row")
POSITIONS = TensorSpec(name="positions", axes=("N",), dtype="int64", doc="true absolute position of each token of this step")
CU_TOKENS = TensorSpec(
    name="cu_tokens", axes=("B+1",), dtype="int64", doc="sequence b owns rows cu_tokens[b] .. cu_tokens[b+1]"
)
SLOTS = TensorSpec(
    name="slots", axes=("L", "N"), dtype="int64", doc="pool slot (page * P + offset) that each token of this step is written to"
)
PAGE_TABLE = TensorSpec(
    name="page_table", axes=("L", "B", "T"), dtype="int64", doc="pool pages of each sequence, -1 beyond its last"
)
KV_LEN = TensorSpec(
    name="kv_len", axes=("L", "B"), dtype="int64", doc="cached tokens of each sequence, this step's tokens included"
)
KV = TensorSpec(
    name="kv", axes=("M", "2", "K", "P", "D"), dtype="float", doc="KV pages; page-heads contiguous, keys after RoPE", state=True
)
TOKEN_POSITIONS = TensorSpec(
    name="token_positions",
    axes=("M", "K", "P"),
    dtype="int64",
    doc="true absolute position of the token in each slot of each KV head",
    state=True,
)
SCORES = TensorSpec(
    name="scores",
    axes=("M", "K", "P"),
    dtype="float32",
    doc="importance accumulated by the token in each slot of each KV head",
    state=True,
)
LAYER = AttributeSpec(name="layer", type="int", doc="which row of slots, page_table and kv_len this node reads")
SCALE = AttributeSpec(name="scale", type="float", doc="factor on q.k before the softmax, usually D ** -0.5")
SOFT_CAP = AttributeSpec(
    name="soft_cap",
    type="float",
    doc="c of c * tanh(scale * q.k / c), which is the logit of the softmax; 0: scale * q.k is",
    default=0.0,
)
PAGE_SIZE = AttributeSpec(name="page_size", type="int", doc="slots per page, the P of every state")
