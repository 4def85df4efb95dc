"""EvictTokens: keep a sequence's best tokens in one layer and compact its pages."""

from trt_kv.opspec import AttributeSpec, Case, OpSpec, TensorSpec, Tolerance
from trt_kv.plugins import tensors as t

DIMS = {"H": 4, "K": 2, "D": 6, "P": 5, "L": 2}

SPEC = OpSpec(
    name="EvictTokens",
    summary=(
        "For every sequence whose evict flag is 1: of its n cached tokens keep n - round((1 - kept_share) * n), or exactly "
        "budget[b] where the input budget is given: the `sinks` lowest and `recent` highest positions always, the others by "
        "score, equal scores by lower position. Kept tokens move to the front of the sequence's pages in order of position. "
        "The share is fp32, the product fp64; round() takes halves to the even neighbour. A budget below the protected tokens "
        "keeps the protected tokens."
    ),
    source="PrefixKV (arXiv 2412.03409), eviction once after prefill; protected tokens as in the released code (1 and 1)",
    inputs=(
        TensorSpec(name="evict", axes=("B",), dtype="int64", doc="1: evict from this sequence now; 0: leave it alone"),
        t.PAGE_TABLE,
        t.KV_LEN,
        t.KV,
        t.TOKEN_POSITIONS,
        t.SCORES,
        TensorSpec(
            name="budget", axes=("B",), dtype="int64", doc="tokens to keep, instead of the share kept_share", optional=True
        ),
    ),
    outputs=(TensorSpec(name="kept", axes=("B",), dtype="int64", doc="cached tokens of each sequence afterwards"),),
    attributes=(
        t.LAYER,
        t.PAGE_SIZE,
        AttributeSpec(name="kept_share", type="float", doc="share of the cached tokens to keep, in (0, 1]"),
        AttributeSpec(name="sinks", type="int", doc="first tokens that are never evicted", default=1),
        AttributeSpec(name="recent", type="int", doc="last tokens that are never evicted", default=1),
    ),
    cases=(
        Case(name="half", cached=(23,), new=(0,), dims=DIMS, attributes={"kept_share": 0.5}),
        Case(
            name="ragged", cached=(31, 4, 17), new=(0, 0, 0), dims=DIMS, attributes={"kept_share": 0.3, "sinks": 2, "recent": 3}
        ),
        Case(name="keep_all", cached=(12, 9), new=(0, 0), dims={**DIMS, "P": 17}, attributes={"kept_share": 1.0}),
        Case(
            name="protected_only", cached=(40,), new=(0,), dims=DIMS, attributes={"kept_share": 0.01, "sinks": 3, "recent": 4}
        ),
        Case(
            name="unprotected",
            cached=(19, 2),
            new=(0, 0),
            dims={**DIMS, "H": 9, "K": 3},
            attributes={"kept_share": 0.5, "sinks": 0, "recent": 0},
        ),
        Case(
            name="shorter_than_protected",
            cached=(2,),
            new=(0,),
            dims=DIMS,
            attributes={"kept_share": 0.1, "sinks": 2, "recent": 2},
        ),
        Case(
            name="some_left_alone",
            cached=(14, 15, 16),
            new=(0, 0, 0),
            dims=DIMS,
            attributes={"kept_share": 0.4},
            values={"evict": (1, 0, 1)},
        ),
        Case(
            name="explicit_budget",
            cached=(14, 21),
            new=(0, 0),
            dims={**DIMS, "L": 7},
            attributes={"kept_share": 0.4},
            values={"budget": (13, 4)},
        ),
        Case(
            name="equal_scores",
            cached=(18,),
            new=(0,),
            dims={**DIMS, "D": 22, "P": 3},
            attributes={"kept_share": 0.5},
            values={"scores": (1,)},
        ),
    ),
    tolerance=Tolerance(atol=0.0, rtol=0.0, reason="tokens are moved, never computed with"),
)
