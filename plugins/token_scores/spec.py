"""TokenScores: accumulate the importance of each cached token from this step's queries, streaming."""

from trt_kv.opspec import AttributeSpec, Case, OpSpec, TensorSpec, Tolerance
from trt_kv.plugins import tensors as t

SPEC = OpSpec(
    name="TokenScores",
    summary=(
        "Add to every cached token's score the attention it receives from this step's queries: the mean over query heads of "
        "the softmax weight, summed over the queries that count. Tokens appended in this step start at 0. With window 0 every "
        "prompt query counts (PrefixKV's mass); with window W only the last W prompt queries do (an observation window)."
    ),
    source="PrefixKV (arXiv 2412.03409): I_l[n] = sum_m mean_h A^{l,h}[m, n]; window: SnapKV (arXiv 2404.14469)",
    inputs=(
        t.Q,
        t.LSE,
        t.POSITIONS,
        t.CU_TOKENS,
        TensorSpec(
            name="prompt_remaining",
            axes=("N",),
            dtype="int64",
            doc="prompt tokens still to come after this one; -1: a generated token, which never counts",
        ),
        t.SLOTS,
        t.PAGE_TABLE,
        t.KV_LEN,
        TensorSpec(name="kv", axes=t.KV.axes, dtype="float", doc="KV pages, this step's tokens already written"),
        TensorSpec(name="token_positions", axes=("M", "P"), dtype="int64", doc=t.TOKEN_POSITIONS.doc),
        t.SCORES,
    ),
    outputs=(),
    attributes=(
        t.LAYER,
        t.SCALE,
        t.PAGE_SIZE,
        AttributeSpec(name="window", type="int", doc="how many of the last prompt queries count; 0: all of them", default=0),
    ),
    cases=(
        Case(name="prefill", cached=(0,), new=(23,), dims={"H": 4, "K": 2, "D": 6, "P": 5, "L": 1}),
        Case(name="chunk", cached=(17,), new=(9,), dims={"H": 3, "K": 1, "D": 14, "P": 8, "L": 3}, attributes={"window": 4}),
        Case(name="decode", cached=(5, 13, 1), new=(1, 1, 1), dims={"H": 6, "K": 3, "D": 10, "P": 4, "L": 2}),
        Case(
            name="mixed",
            cached=(0, 11, 30, 2),
            new=(7, 1, 5, 1),
            dims={"H": 10, "K": 5, "D": 3, "P": 7, "L": 2},
            attributes={"window": 3},
        ),
        Case(name="many_layers", cached=(4, 3), new=(2, 1), dims={"H": 2, "K": 1, "D": 6, "P": 37, "L": 11}),
    ),
    tolerance=Tolerance(atol=2e-5, rtol=2e-5, reason="fp32 sums over heads and queries in another order"),
)
