"""EvictTokens: keep each KV head's best tokens of a sequence in one layer and compact its pages."""

import math

from trt_kv.opspec import AttributeSpec, Case, OpSpec, TensorSpec, Tolerance
from trt_kv.plugins import tensors as t

DIMS = {"H": 4, "K": 2, "D": 6, "P": 5, "L": 2}

SPEC = OpSpec(
    name="EvictTokens",
    summary=(
        "For every sequence whose evict flag is not 0, with n cached tokens: all KV heads keep the same number of tokens, "
        "each its own. target = n - drop if the flag is 2; else budget[b] if that input is given; else kept_tokens + n - "
        "round((1 - kept_share) * n); at least max(1, floor), at most n. recents = max(recent, floor(recent_share * max(0, "
        "target - sinks))). kept = max(target, sinks + recents), at most n. The `sinks` lowest and `recents` highest "
        "positions always stay; of the others the first by ranking, ties by lower position. Ranking 0: higher scores first. "
        "1: newest first. 2: random, a hash of (seed, layer, KV head, position), see plugins/lots.py. Rankings 1 and 2 never "
        "read the scores. With flag 1 the kept tokens move to the front of the sequence's pages in order of position. With "
        "flag 2, which is for decoding, kept tokens in the first `kept` slots stay there, and kept tokens in later slots move"
        " into the freed slots, both in slot order. Shares are fp32, their products fp64; round() takes halves to the even "
        "neighbour."
    ),
    source=(
        "PrefixKV (arXiv 2412.03409), eviction once after prefill, protected tokens as in the released code (1 and 1); drop: "
        "H2O (arXiv 2306.14048, algorithm 1) and StreamingLLM (arXiv 2309.17453); recent_share: H2O's half for recent tokens"
    ),
    inputs=(
        TensorSpec(
            name="evict",
            axes=("B",),
            dtype="int64",
            doc="0: leave the sequence alone; 1: shrink it to its budget; 2: evict `drop` tokens",
        ),
        t.PAGE_TABLE,
        t.KV_LEN,
        t.KV,
        t.TOKEN_POSITIONS,
        t.SCORES,
        TensorSpec(
            name="budget",
            axes=("B",),
            dtype="int64",
            doc="tokens to keep, instead of kept_tokens and kept_share",
            optional=True,
        ),
    ),
    outputs=(TensorSpec(name="kept", axes=("B",), dtype="int64", doc="cached tokens of each sequence afterwards"),),
    attributes=(
        t.LAYER,
        t.PAGE_SIZE,
        AttributeSpec(name="kept_share", type="float", doc="share of the cached tokens to keep, in [0, 1]"),
        AttributeSpec(name="kept_tokens", type="int", doc="tokens to keep on top of the share; may be negative", default=0),
        AttributeSpec(name="floor", type="int", doc="tokens that a sequence may hold without eviction", default=0),
        AttributeSpec(name="drop", type="int", doc="tokens that flag 2 evicts", default=1),
        AttributeSpec(name="sinks", type="int", doc="first tokens that are never evicted", default=1),
        AttributeSpec(name="recent", type="int", doc="last tokens that are never evicted", default=1),
        AttributeSpec(
            name="recent_share",
            type="float",
            doc="share of the kept tokens without the sinks that goes to the most recent ones, in [0, 1]",
            default=0.0,
        ),
        AttributeSpec(name="ranking", type="int", doc="0: by scores, 1: newest first, 2: random", default=0),
        AttributeSpec(name="seed", type="int", doc="seed of ranking 2, in [0, 2**31)", default=0),
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
            name="budget_out_of_range",
            cached=(14, 21, 9),
            new=(0, 0, 0),
            dims=DIMS,
            attributes={"kept_share": 0.4, "kept_tokens": 3, "recent_share": 0.5},
            values={"budget": (99, 0, -2)},
        ),
        Case(
            name="own_tokens",
            cached=(14, 21),
            new=(0, 0),
            dims={**DIMS, "H": 6, "K": 3, "P": 8},
            attributes={"kept_share": 0.6, "sinks": 2, "recent": 3},
            own_tokens=True,
        ),
        Case(
            name="equal_scores",
            cached=(18,),
            new=(0,),
            dims={**DIMS, "D": 22, "P": 3},
            attributes={"kept_share": 0.5},
            values={"scores": (1,)},
        ),
        Case(
            name="number_of_tokens",
            cached=(31, 4, 17),
            new=(0, 0, 0),
            dims={**DIMS, "H": 8, "K": 4},
            attributes={"kept_share": 0.0, "kept_tokens": 9, "sinks": 2, "recent": 0},
        ),
        Case(
            name="fewer_than_the_share",
            cached=(31, 4, 17),
            new=(0, 0, 0),
            dims=DIMS,
            attributes={"kept_share": 0.5, "kept_tokens": -4, "sinks": 0, "recent": 0},
        ),
        Case(
            name="floor",
            cached=(31, 4, 17),
            new=(0, 0, 0),
            dims={**DIMS, "P": 4},
            attributes={"kept_share": 0.2, "floor": 17, "sinks": 0, "recent": 0, "recent_share": 0.5},
        ),
        Case(
            name="one_stays",
            cached=(9, 1, 6),
            new=(0, 0, 0),
            dims={**DIMS, "H": 5, "K": 5},
            attributes={"kept_share": 0.01, "drop": 6, "sinks": 0, "recent": 0},
            values={"evict": (1, 1, 2)},
        ),
        Case(
            name="drop_to_the_floor",
            cached=(13, 8, 14),
            new=(0, 0, 0),
            dims={**DIMS, "D": 10},
            attributes={"kept_share": 0.1, "floor": 12, "drop": 3, "sinks": 2, "recent": 0},
            values={"evict": (2, 2, 2)},
        ),
        Case(
            name="budget_below_the_floor",
            cached=(13, 21),
            new=(0, 0),
            dims={**DIMS, "P": 6},
            attributes={"kept_share": 0.4, "floor": 9, "sinks": 1},
            values={"budget": (4, 15)},
        ),
        Case(
            name="half_recent",
            cached=(27, 6, 40),
            new=(0, 0, 0),
            dims={**DIMS, "H": 3, "K": 3, "P": 9},
            attributes={"kept_share": 0.4, "sinks": 3, "recent": 2, "recent_share": 0.5},
        ),
        Case(
            name="newest",
            cached=(23, 5, 12),
            new=(0, 0, 0),
            dims=DIMS,
            attributes={"kept_share": 0.5, "sinks": 4, "recent": 0, "ranking": 1},
            values={"scores": (math.nan,)},
        ),
        Case(
            name="newest_own_tokens",
            cached=(23, 5, 12),
            new=(0, 0, 0),
            dims={**DIMS, "P": 6},
            attributes={"kept_share": 0.3, "sinks": 2, "ranking": 1},
            own_tokens=True,
        ),
        Case(
            name="lots",
            cached=(33, 5, 18),
            new=(0, 0, 0),
            dims={**DIMS, "H": 6, "K": 6},
            attributes={"kept_share": 0.5, "ranking": 2, "seed": 2147483646},
            values={"scores": (math.nan,)},
        ),
        Case(
            name="drop",
            cached=(23, 9, 14, 1),
            new=(0, 0, 0, 0),
            dims=DIMS,
            attributes={"kept_share": 0.5, "kept_tokens": 7, "drop": 1, "sinks": 2, "recent_share": 0.5},
            values={"evict": (2, 2, 0, 2)},
            own_tokens=True,
        ),
        Case(
            name="drop_equal_scores",
            cached=(12, 7),
            new=(0, 0),
            dims={**DIMS, "H": 5, "K": 5, "P": 3},
            attributes={"kept_share": 1.0, "drop": 1},
            values={"scores": (2,), "evict": (2, 2)},
        ),
        Case(
            name="drop_oldest",
            cached=(13, 4, 8),
            new=(0, 0, 0),
            dims=DIMS,
            attributes={"kept_share": 1.0, "drop": 1, "sinks": 4, "recent": 0, "ranking": 1},
            values={"scores": (math.nan,), "evict": (2, 2, 1)},
        ),
        Case(
            name="drop_by_lots",
            cached=(26, 9),
            new=(0, 0),
            dims=DIMS,
            attributes={"kept_share": 1.0, "drop": 1, "ranking": 2, "seed": 7},
            values={"scores": (math.nan,), "evict": (2, 2)},
            own_tokens=True,
        ),
        Case(
            name="drop_several",
            cached=(23, 9, 14, 2),
            new=(0, 0, 0, 0),
            dims={**DIMS, "K": 4},
            attributes={"kept_share": 0.8, "drop": 5, "sinks": 2, "recent": 3},
            values={"evict": (2, 1, 2, 2)},
            own_tokens=True,
        ),
        Case(
            name="drop_protected",
            cached=(6, 5),
            new=(0, 0),
            dims=DIMS,
            attributes={"kept_share": 1.0, "drop": 2, "sinks": 2, "recent": 3},
            values={"evict": (2, 2)},
        ),
    ),
    tolerance=Tolerance(atol=0.0, rtol=0.0, reason="tokens are moved, never computed with"),
)
