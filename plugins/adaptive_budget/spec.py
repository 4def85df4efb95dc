"""AdaptiveBudget: per sequence, the number of tokens a layer must keep to preserve most of the norm of an attention row."""

from trt_kv.opspec import AttributeSpec, Case, OpSpec, TensorSpec, Tolerance
from trt_kv.plugins import tensors as t

NO_WEIGHT = 2.0**-100
"""A weight below this counts as 0, so that fp32 and fp64 agree on rows in which all weight lies on protected tokens."""

DIMS = {"H": 4, "K": 2, "D": 6, "P": 5, "L": 2}
BY_SCORE = {"ranking": 0, "sinks": 2, "recent": 2}
DRAWN_SCORES: dict[str, tuple[float, ...]] = {"scores": ()}

SPEC = OpSpec(
    name="AdaptiveBudget",
    summary=(
        "For every sequence whose evict flag is 1: the number of its n cached tokens that this layer keeps. The `sinks` "
        "lowest and `recent` highest positions of each KV head are protected. The other C tokens are candidates, in order "
        "of `ranking`. A row a_h gives each token a weight: row 0 is the attention of the sequence's last query of this "
        "step, exp(logit - lse), for each query head; row 1 is the scores, for each KV head. S_c is the mean over "
        "these rows of sqrt(sum of a_h^2), summed over the first c candidates of the row's KV head, and over its "
        "protected tokens too where protected_in_norm is 1. The budget is the number of protected tokens plus the "
        "smallest c >= 0 with S_c >= (1 - threshold) * S_C, one number for all heads. If all candidates have weight 0 (S_C "
        "= 0), none is kept. Everything is kept in sequences of at most sinks + recent tokens, with another flag or, for row "
        "0, without a query in this step. Ties in score go to the lower position. Weights below 2^-100 count as 0. Scores "
        "are read, and required, only for ranking 0 or row 1."
    ),
    source=(
        "ReFreeKV (arXiv 2502.16886), Uni-Metric: attention of the last query, threshold 1 %, 4 sinks, then newest first; the "
        "norm excludes protected tokens like the released code, or includes them like the paper's formula"
    ),
    inputs=(
        t.Q,
        t.LSE,
        t.CU_TOKENS,
        TensorSpec(name="evict", axes=("B",), dtype="int64", doc="1: compute a budget; else the budget is all tokens"),
        t.PAGE_TABLE,
        t.KV_LEN,
        TensorSpec(name="kv", axes=t.KV.axes, dtype="float", doc="KV pages, this step's tokens already written"),
        TensorSpec(name="token_positions", axes=t.TOKEN_POSITIONS.axes, dtype="int64", doc=t.TOKEN_POSITIONS.doc),
        TensorSpec(name="scores", axes=t.SCORES.axes, dtype="float32", doc=t.SCORES.doc, optional=True),
    ),
    outputs=(TensorSpec(name="budget", axes=("B",), dtype="int64", doc="tokens of each sequence to keep in this layer"),),
    attributes=(
        t.LAYER,
        t.SCALE,
        t.PAGE_SIZE,
        AttributeSpec(name="threshold", type="float", doc="share of the norm that may be lost, in [0, 1], taken in fp32"),
        AttributeSpec(name="sinks", type="int", doc="first tokens that are always kept", default=4),
        AttributeSpec(name="recent", type="int", doc="last tokens that are always kept", default=0),
        AttributeSpec(name="ranking", type="int", doc="0: higher score first; 1: newest first", default=1),
        AttributeSpec(name="row", type="int", doc="0: attention of the last query; 1: the scores", default=0),
        AttributeSpec(
            name="protected_in_norm", type="int", doc="1: norms include the protected tokens; 0: they exclude them", default=0
        ),
        t.SOFT_CAP,
    ),
    cases=(
        Case(name="prefill", cached=(0,), new=(41,), dims={**DIMS, "L": 1}, attributes={"threshold": 0.01}),
        Case(
            name="chunk_multi_head",
            cached=(17,),
            new=(9,),
            dims={"H": 3, "K": 3, "D": 14, "P": 8, "L": 2},
            attributes={"threshold": 0.1, "recent": 2},
        ),
        Case(
            name="ragged_some_left_alone",
            cached=(0, 11, 33, 25),
            new=(7, 1, 5, 2),
            dims={"H": 10, "K": 5, "D": 3, "P": 7, "L": 2},
            attributes={"threshold": 0.05},
            values={"evict": (1, 0, 1, 2)},
        ),
        Case(
            name="heads_hold_other_tokens",
            cached=(37, 12),
            new=(4, 3),
            dims={**DIMS, "H": 9, "K": 3},
            attributes={"threshold": 0.05},
            own_tokens=True,
        ),
        Case(
            name="sinks_in_the_norm",
            cached=(20, 0),
            new=(6, 15),
            dims=DIMS,
            attributes={"threshold": 0.1, "protected_in_norm": 1},
        ),
        Case(name="nothing_may_be_lost", cached=(5, 16), new=(11, 3), dims={**DIMS, "P": 13}, attributes={"threshold": 0.001}),
        Case(
            name="most_may_be_lost",
            cached=(19,),
            new=(8,),
            dims=DIMS,
            attributes={"threshold": 0.75, "sinks": 3, "recent": 4},
        ),
        Case(name="shorter_than_the_sinks", cached=(1, 0), new=(2, 4), dims=DIMS, attributes={"threshold": 0.01}),
        Case(
            name="unprotected",
            cached=(14, 0),
            new=(5, 1),
            dims={**DIMS, "D": 22, "P": 3},
            attributes={"threshold": 0.1, "sinks": 0},
        ),
        Case(
            name="ranked_by_score",
            cached=(35, 22),
            new=(1, 2),
            dims={**DIMS, "H": 6, "K": 3},
            attributes={**BY_SCORE, "threshold": 0.1},
            values=DRAWN_SCORES,
            own_tokens=True,
        ),
        Case(
            name="scores_as_row",
            cached=(31, 18),
            new=(2, 1),
            dims={**DIMS, "L": 11},
            attributes={**BY_SCORE, "threshold": 0.05, "row": 1},
            values=DRAWN_SCORES,
        ),
        Case(
            name="scores_as_row_newest_first",
            cached=(24,),
            new=(3,),
            dims={**DIMS, "H": 6, "K": 3},
            attributes={"threshold": 0.1, "recent": 3, "row": 1},
            values=DRAWN_SCORES,
            own_tokens=True,
        ),
        Case(
            name="equal_scores",
            cached=(18, 29),
            new=(3, 1),
            dims=DIMS,
            attributes={"ranking": 0, "threshold": 0.1, "protected_in_norm": 1},
            values={"scores": (1,)},
        ),
        Case(
            name="soft_cap",
            cached=(21, 34),
            new=(4, 1),
            dims={**DIMS, "H": 6, "K": 3},
            attributes={"threshold": 0.05, "soft_cap": 0.6},
        ),
    ),
    tolerance=Tolerance(
        atol=0.0,
        rtol=0.0,
        reason=(
            "a count of tokens, never off by one where S_c is not within rounding of the threshold (1e-6 of S_C); "
            "tests/test_adaptive_budget.py checks that no case is"
        ),
    ),
)
