"""TokenScores: accumulate the importance of each cached token from this step's queries, streaming."""

from trt_kv.opspec import AttributeSpec, Case, OpSpec, TensorSpec, Tolerance
from trt_kv.plugins import tensors as t

SPEC = OpSpec(
    name="TokenScores",
    summary=(
        "Add to every cached token's score the attention it receives from this step's queries: the mean over query heads of "
        "the softmax weight, summed over the queries that count. Tokens appended in this step start at 0. The mean is over all "
        "query heads and the same for every KV head, which then must hold the same tokens (per_head 0), or over those that "
        "share the KV head (per_head 1). With window 0 every prompt query counts (PrefixKV's sum); with window W only the "
        "last W prompt queries do (an observation window). In the step that holds the sequence's last prompt token, at "
        "position p, scores are finished: average 1 divides the score of the token at position s by the number of counted "
        "prompt queries that may see it, min(p - s + 1, W); then pooling k replaces the scores of the tokens at "
        "positions up to p - window by the mean over k of them, neighbours in order of position, zeros beyond the first and "
        "the last. With maximum 1 a score is the largest weight that any of its query heads gives the token in any query that "
        "counts, instead of the mean and the sum. value_norm 1 comes last: scores at positions up to p - window are raised to "
        "at least their mean over the KV head, then all scores of the sequence are multiplied by the L2 norm of the token's "
        "value in that KV head (per_head 1), or of its values in all KV heads (per_head 0)."
    ),
    source=(
        "PrefixKV (arXiv 2412.03409): I_l[n] = sum_m mean_h A^{l,h}[m, n]; window, pooling and scores per KV head: SnapKV "
        "(arXiv 2404.14469), avg_pool1d with count_include_pad; generated tokens: H2O (arXiv 2306.14048); average: kvpress, "
        "ObservedAttentionPress; maximum and the mean as a floor: DefensiveKV (arXiv 2510.13334), which takes the norm of the "
        "value after the output projection"
    ),
    inputs=(
        t.Q,
        t.LSE,
        t.POSITIONS,
        t.CU_TOKENS,
        TensorSpec(
            name="prompt_remaining",
            axes=("N",),
            dtype="int64",
            doc="prompt tokens still to come after this one; -1: a generated token, which counts only with generated 1",
        ),
        t.SLOTS,
        t.PAGE_TABLE,
        t.KV_LEN,
        TensorSpec(name="kv", axes=t.KV.axes, dtype="float", doc="KV pages, this step's tokens already written"),
        TensorSpec(name="token_positions", axes=t.TOKEN_POSITIONS.axes, dtype="int64", doc=t.TOKEN_POSITIONS.doc),
        t.SCORES,
    ),
    outputs=(),
    attributes=(
        t.LAYER,
        t.SCALE,
        t.PAGE_SIZE,
        AttributeSpec(name="window", type="int", doc="how many of the last prompt queries count; 0: all of them", default=0),
        AttributeSpec(
            name="per_head", type="int", doc="1: each KV head gets the mean over its own query heads; 0: over all", default=0
        ),
        AttributeSpec(
            name="pooling", type="int", doc="neighbours that finished scores are averaged over; odd, 1: none", default=1
        ),
        AttributeSpec(
            name="average", type="int", doc="1: finished scores are means over the queries that count, not sums", default=0
        ),
        AttributeSpec(
            name="generated", type="int", doc="1: queries of generated tokens count too, regardless of the window", default=0
        ),
        t.SOFT_CAP,
        AttributeSpec(
            name="maximum", type="int", doc="1: scores are maxima over query heads and queries, not sums of means", default=0
        ),
        AttributeSpec(
            name="value_norm",
            type="int",
            doc="1: finished scores, at least their mean, are multiplied by the norm of the token's value",
            default=0,
        ),
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
        Case(name="many_layers", cached=(4, 3), new=(2, 1), dims={"H": 2, "K": 1, "D": 6, "P": 19, "L": 11}),
        Case(
            name="per_head",
            cached=(0, 11, 3),
            new=(8, 6, 1),
            dims={"H": 6, "K": 2, "D": 5, "P": 4, "L": 2},
            attributes={"per_head": 1},
        ),
        Case(
            name="multi_head",
            cached=(9,),
            new=(6,),
            dims={"H": 7, "K": 7, "D": 5, "P": 3, "L": 1},
            attributes={"per_head": 1, "window": 5},
        ),
        Case(
            name="own_tokens",
            cached=(12, 0, 19, 6),
            new=(6, 3, 2, 1),
            dims={"H": 6, "K": 3, "D": 10, "P": 7, "L": 2},
            attributes={"per_head": 1, "window": 7},
            own_tokens=True,
        ),
        Case(
            name="generated",
            cached=(11, 4, 16, 7),
            new=(1, 1, 1, 5),
            dims={"H": 6, "K": 3, "D": 8, "P": 5, "L": 2},
            attributes={"per_head": 1, "generated": 1, "window": 2, "average": 1, "pooling": 3},
            values={"prompt_remaining": (-1, -1, 9, 1, 0, -1, -1, -1)},
            own_tokens=True,
        ),
        Case(
            name="generated_shared",
            cached=(11, 4, 16),
            new=(1, 1, 3),
            dims={"H": 8, "K": 2, "D": 5, "P": 6, "L": 1},
            attributes={"generated": 1},
            values={"prompt_remaining": (-1, 0, 1, 0, -1)},
        ),
        Case(
            name="average",
            cached=(6, 0, 7, 5),
            new=(4, 8, 3, 1),
            dims={"H": 4, "K": 2, "D": 6, "P": 5, "L": 2},
            attributes={"average": 1},
            values={"prompt_remaining": (3, 2, 1, 0, 7, 6, 5, 4, 3, 2, 1, 0, 9, 8, 7, 0)},
        ),
        Case(
            name="average_window",
            cached=(9, 0, 7),
            new=(5, 3, 1),
            dims={"H": 9, "K": 3, "D": 4, "P": 6, "L": 1},
            attributes={"average": 1, "window": 4, "per_head": 1},
            values={"prompt_remaining": (4, 3, 2, 1, 0, 2, 1, 0, 5)},
        ),
        Case(
            name="pooling",
            cached=(14, 0, 3, 8),
            new=(7, 9, 2, 1),
            dims={"H": 6, "K": 2, "D": 7, "P": 5, "L": 2},
            attributes={"per_head": 1, "window": 4, "pooling": 5},
            values={"prompt_remaining": (6, 5, 4, 3, 2, 1, 0, 8, 7, 6, 5, 4, 3, 2, 1, 0, 12, 11, 0)},
        ),
        Case(
            name="pooling_of_everything",
            cached=(11, 0, 1),
            new=(4, 6, 1),
            dims={"H": 4, "K": 4, "D": 3, "P": 9, "L": 1},
            attributes={"pooling": 3, "average": 1, "per_head": 1},
            values={"prompt_remaining": (3, 2, 1, 0, 5, 4, 3, 2, 1, 0, 0)},
            own_tokens=True,
        ),
        Case(
            name="pooling_wider_than_the_prompt",
            cached=(0, 2),
            new=(3, 4),
            dims={"H": 2, "K": 1, "D": 5, "P": 4, "L": 1},
            attributes={"pooling": 9, "window": 2},
            values={"prompt_remaining": (2, 1, 0, 3, 2, 1, 0)},
        ),
        Case(
            name="soft_cap",
            cached=(0, 11, 30, 2),
            new=(7, 1, 5, 1),
            dims={"H": 10, "K": 5, "D": 3, "P": 7, "L": 2},
            attributes={"soft_cap": 0.4},
        ),
        Case(
            name="soft_cap_generated",
            cached=(11, 4, 16),
            new=(1, 1, 3),
            dims={"H": 6, "K": 2, "D": 5, "P": 6, "L": 1},
            attributes={"generated": 1, "per_head": 1, "soft_cap": 1.2},
            values={"prompt_remaining": (-1, 0, 1, 0, -1)},
        ),
        Case(
            name="maximum",
            cached=(0, 11, 30, 2),
            new=(7, 1, 5, 1),
            dims={"H": 10, "K": 5, "D": 3, "P": 7, "L": 2},
            attributes={"maximum": 1, "window": 3, "per_head": 1},
            own_tokens=True,
        ),
        Case(
            name="maximum_shared",
            cached=(11, 4, 16),
            new=(1, 1, 3),
            dims={"H": 6, "K": 2, "D": 5, "P": 6, "L": 1},
            attributes={"maximum": 1, "generated": 1, "soft_cap": 0.7},
            values={"prompt_remaining": (-1, 0, 1, 0, -1)},
        ),
        Case(
            name="defensive",
            cached=(14, 0, 3, 8),
            new=(7, 9, 2, 1),
            dims={"H": 6, "K": 2, "D": 7, "P": 5, "L": 2},
            attributes={"maximum": 1, "value_norm": 1, "per_head": 1, "window": 4, "pooling": 5},
            values={"prompt_remaining": (6, 5, 4, 3, 2, 1, 0, 8, 7, 6, 5, 4, 3, 2, 1, 0, 12, 11, 0)},
            own_tokens=True,
        ),
        Case(
            name="defensive_shared",
            cached=(14, 0, 3, 8),
            new=(7, 9, 2, 1),
            dims={"H": 6, "K": 3, "D": 10, "P": 4, "L": 2},
            attributes={"maximum": 1, "value_norm": 1, "window": 2},
            values={"prompt_remaining": (6, 5, 4, 3, 2, 1, 0, 8, 7, 6, 5, 4, 3, 2, 1, 0, 12, 11, 0)},
        ),
        Case(
            name="value_norm_of_sums",
            cached=(6, 0, 7, 5),
            new=(4, 8, 3, 1),
            dims={"H": 4, "K": 2, "D": 6, "P": 5, "L": 2},
            attributes={"value_norm": 1, "average": 1, "per_head": 1},
            values={"prompt_remaining": (3, 2, 1, 0, 7, 6, 5, 4, 3, 2, 1, 0, 9, 8, 7, 0)},
        ),
        Case(
            name="value_norm_of_prompts_within_the_window",
            cached=(0, 2),
            new=(3, 4),
            dims={"H": 2, "K": 1, "D": 5, "P": 4, "L": 1},
            attributes={"value_norm": 1, "maximum": 1, "window": 9, "pooling": 3, "per_head": 1},
            values={"prompt_remaining": (2, 1, 0, 3, 2, 1, 0)},
        ),
    ),
    tolerance=Tolerance(atol=2e-5, rtol=2e-5, reason="fp32 sums over heads and queries in another order"),
)
