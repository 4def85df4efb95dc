"""CachedAttention: append this step's K and V, then attend over each sequence's cached tokens of one layer.

Why slot order means nothing: docs/decisions/0003-decode-eviction-by-slot-reuse.md.
"""

from trt_kv.opspec import Case, OpSpec, TensorSpec, Tolerance
from trt_kv.plugins import tensors as t

SPEC = OpSpec(
    name="CachedAttention",
    summary=(
        "Write k and v to their slots, then let every query attend to the tokens of its own sequence whose position is not "
        "greater than its own. A slot may hold different tokens in different KV heads. Slot order has no meaning. Lengths "
        "differ per layer and sequence."
    ),
    source="paged attention (arXiv 2309.06180, section 4.1), with lengths per layer",
    inputs=(
        t.Q,
        t.K,
        t.V,
        t.POSITIONS,
        t.CU_TOKENS,
        t.SLOTS,
        t.PAGE_TABLE,
        t.KV_LEN,
        t.KV,
        t.TOKEN_POSITIONS,
    ),
    outputs=(
        TensorSpec(name="out", axes=("N", "H", "D"), dtype="float", doc="attention output"),
        t.LSE,
    ),
    attributes=(t.LAYER, t.SCALE, t.PAGE_SIZE),
    cases=(
        Case(name="decode", cached=(5, 13, 1), new=(1, 1, 1), dims={"H": 6, "K": 3, "D": 10, "P": 4, "L": 2}),
        Case(name="prefill", cached=(0,), new=(23,), dims={"H": 4, "K": 2, "D": 6, "P": 5, "L": 1}),
        Case(name="chunk", cached=(17,), new=(9,), dims={"H": 3, "K": 1, "D": 14, "P": 8, "L": 3}),
        Case(name="mixed", cached=(0, 11, 30, 2), new=(7, 1, 5, 1), dims={"H": 10, "K": 5, "D": 3, "P": 7, "L": 2}),
        Case(
            name="own_tokens",
            cached=(12, 0, 19, 6),
            new=(6, 3, 2, 1),
            dims={"H": 6, "K": 3, "D": 10, "P": 7, "L": 2},
            own_tokens=True,
        ),
        Case(name="multi_head", cached=(9,), new=(1,), dims={"H": 7, "K": 7, "D": 5, "P": 3, "L": 1}),
        Case(name="many_layers", cached=(4, 3), new=(2, 1), dims={"H": 2, "K": 1, "D": 6, "P": 5, "L": 11}),
        Case(name="large_pages", cached=(3,), new=(1,), dims={"H": 4, "K": 2, "D": 6, "P": 37, "L": 1}),
    ),
    tolerance=Tolerance(atol=2e-5, rtol=2e-5, reason="fp32 sums of up to a few dozen products in another order"),
)
