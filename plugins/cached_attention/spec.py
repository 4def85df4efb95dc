"""CachedAttention: append this step's K and V, then attend over each sequence's cached tokens of one layer.

Why slot order means nothing: docs/decisions/0003-decode-eviction-by-slot-reuse.md.
"""

from trt_kv.opspec import AttributeSpec, Case, OpSpec, TensorSpec, Tolerance
from trt_kv.plugins import tensors as t

SPEC = OpSpec(
    name="CachedAttention",
    summary=(
        "Write k and v to their slots, then let every query attend to the tokens of its own sequence whose position is not "
        "greater than its own; with a window, only to the last `window` positions up to its own. A query sees at least itself. "
        "A slot may hold different tokens in different KV heads. Slot order has no meaning. Lengths differ per layer and "
        "sequence."
    ),
    source=(
        "paged attention (arXiv 2309.06180, section 4.1), with lengths per layer; windows: Mistral (arXiv 2310.06825, section "
        "2); soft cap: Gemma 2 (arXiv 2408.00118, section 2)"
    ),
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
    attributes=(
        t.LAYER,
        t.SCALE,
        t.PAGE_SIZE,
        AttributeSpec(
            name="window",
            type="int",
            doc="a query at position p sees positions above p - window; 0: all positions up to p",
            default=0,
        ),
        t.SOFT_CAP,
    ),
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
        Case(
            name="window",
            cached=(25, 13, 40),
            new=(1, 1, 1),
            dims={"H": 6, "K": 3, "D": 10, "P": 4, "L": 2},
            attributes={"window": 11},
        ),
        Case(
            name="window_of_a_prompt",
            cached=(0,),
            new=(23,),
            dims={"H": 4, "K": 2, "D": 6, "P": 5, "L": 1},
            attributes={"window": 9},
        ),
        Case(
            name="window_within_a_long_chunk",
            cached=(300,),
            new=(70,),
            dims={"H": 3, "K": 1, "D": 14, "P": 8, "L": 1},
            attributes={"window": 20},
            in_order=True,
        ),
        Case(
            name="window_in_order",
            cached=(37, 30, 12),
            new=(1, 5, 7),
            dims={"H": 6, "K": 2, "D": 6, "P": 5, "L": 2},
            attributes={"window": 6},
            in_order=True,
        ),
        Case(
            name="window_mixed",
            cached=(0, 11, 30, 2),
            new=(7, 1, 5, 1),
            dims={"H": 10, "K": 5, "D": 3, "P": 7, "L": 2},
            attributes={"window": 13, "soft_cap": 0.7},
        ),
        Case(
            name="window_own_tokens",
            cached=(12, 0, 19, 6),
            new=(6, 3, 2, 1),
            dims={"H": 6, "K": 3, "D": 10, "P": 7, "L": 2},
            attributes={"window": 17},
            own_tokens=True,
        ),
        Case(
            name="window_of_one",
            cached=(14, 3),
            new=(4, 1),
            dims={"H": 4, "K": 2, "D": 6, "P": 5, "L": 1},
            attributes={"window": 1},
        ),
        Case(
            name="soft_cap",
            cached=(5, 13, 1),
            new=(1, 1, 1),
            dims={"H": 6, "K": 3, "D": 10, "P": 4, "L": 2},
            attributes={"soft_cap": 0.5},
        ),
        Case(
            name="soft_cap_of_a_chunk",
            cached=(17,),
            new=(9,),
            dims={"H": 3, "K": 1, "D": 14, "P": 8, "L": 3},
            attributes={"soft_cap": 1.5},
        ),
    ),
    tolerance=Tolerance(atol=2e-5, rtol=2e-5, reason="fp32 sums of up to a few dozen products in another order"),
)
