"""PredictedScores: predict the importance of cached tokens from their keys and values, and count those above a threshold."""

from trt_kv.opspec import AttributeSpec, Case, OpSpec, TensorSpec, Tolerance
from trt_kv.plugins import tensors as t

SMALLEST_NORM = 2.0**-60
"""Norms are raised to this before their logarithm is taken; its square is a normal fp32 number."""
TURNS = (1.0, 0.3, 0.02)


def drawn(n: int) -> tuple[float, ...]:
    """Weights of a case: n numbers between -0.5 and 0.5 that look random and are exact in fp32."""
    return tuple((i * 37 % 64) / 64.0 - 0.5 for i in range(1, n + 1))


SPEC = OpSpec(
    name="PredictedScores",
    summary=(
        "For every sequence whose evict flag is 1: the score of each of its cached tokens, in each KV head, is a linear "
        "function of the token's key and value, and the budget is how many tokens the layer is to keep. A key is turned back "
        "by the token's position p: with F frequencies w, channels d and d + F, for d < F, are rotated by the angle -p * w[d] "
        "(in fp32); channels from 2 F on stay. A head's 2 D + 3 weights are, in this order, those of the D channels of the key "
        "that was turned back, of the D channels of the value, of the logarithms of the norms of the key and the value, at "
        "least 2^-60 each, and a constant. The `sinks` lowest and `recent` highest positions of each KV head are protected. A "
        "head needs its protected tokens and every other one whose score exceeds `threshold`; the budget is the largest such "
        "number of the layer's KV heads. In sequences of at most sinks + recent tokens, and with another flag, it is all "
        "tokens; with another flag the scores stay."
    ),
    source=(
        "KVzap (arXiv 2601.07891): a linear surrogate of KVzip's score, one threshold for all layers and heads, the newest "
        "tokens stay; it reads the input of attention, which an op does not have"
    ),
    inputs=(
        TensorSpec(name="evict", axes=("B",), dtype="int64", doc="1: score the tokens and compute a budget; else leave them"),
        t.PAGE_TABLE,
        t.KV_LEN,
        TensorSpec(name="kv", axes=t.KV.axes, dtype="float", doc="KV pages, this step's tokens already written"),
        TensorSpec(name="token_positions", axes=t.TOKEN_POSITIONS.axes, dtype="int64", doc=t.TOKEN_POSITIONS.doc),
        t.SCORES,
    ),
    outputs=(TensorSpec(name="budget", axes=("B",), dtype="int64", doc="tokens of each sequence to keep in this layer"),),
    attributes=(
        t.LAYER,
        t.PAGE_SIZE,
        AttributeSpec(name="weights", type="floats", doc="K * (2 D + 3) numbers, KV head by KV head"),
        AttributeSpec(
            name="frequencies",
            type="floats",
            doc="radians per position by which a pair of a key's channels was turned; 0: none",
        ),
        AttributeSpec(name="threshold", type="float", doc="a token stays if its score exceeds this"),
        AttributeSpec(name="sinks", type="int", doc="first tokens that always stay", default=4),
        AttributeSpec(name="recent", type="int", doc="last tokens that always stay", default=0),
    ),
    cases=(
        Case(
            name="one_head",
            cached=(0,),
            new=(37,),
            dims={"H": 2, "K": 1, "D": 6, "P": 5, "L": 2},
            attributes={"weights": drawn(15), "frequencies": TURNS, "threshold": 0.1},
        ),
        Case(
            name="several_heads",
            cached=(21, 0),
            new=(4, 16),
            dims={"H": 6, "K": 3, "D": 6, "P": 4, "L": 1},
            attributes={"weights": drawn(45), "frequencies": TURNS, "threshold": -0.2, "sinks": 2, "recent": 3},
        ),
        Case(
            name="own_tokens",
            cached=(17, 9),
            new=(3, 1),
            dims={"H": 4, "K": 2, "D": 10, "P": 13, "L": 2},
            attributes={"weights": drawn(46), "frequencies": TURNS, "threshold": 0.4, "sinks": 0, "recent": 1},
            own_tokens=True,
        ),
        Case(
            name="without_rotation",
            cached=(12,),
            new=(6,),
            dims={"H": 2, "K": 2, "D": 4, "P": 3, "L": 7},
            attributes={"weights": drawn(22), "frequencies": (0.0, 0.0), "threshold": 0.0, "sinks": 1},
        ),
        Case(
            name="some_left_alone",
            cached=(12, 8, 20),
            new=(2, 5, 1),
            dims={"H": 2, "K": 1, "D": 8, "P": 6, "L": 3},
            attributes={"weights": drawn(19), "frequencies": TURNS, "threshold": 0.2, "recent": 2},
            values={"evict": (1, 0, 2)},
        ),
        Case(
            name="shorter_than_protected",
            cached=(1, 0),
            new=(2, 4),
            dims={"H": 2, "K": 1, "D": 6, "P": 5, "L": 1},
            attributes={"weights": drawn(15), "frequencies": TURNS, "threshold": 0.0, "sinks": 3, "recent": 2},
        ),
        Case(
            name="everything_above",
            cached=(15,),
            new=(5,),
            dims={"H": 2, "K": 1, "D": 6, "P": 5, "L": 1},
            attributes={"weights": drawn(15), "frequencies": TURNS, "threshold": -1e6},
        ),
        Case(
            name="nothing_above",
            cached=(15,),
            new=(5,),
            dims={"H": 2, "K": 1, "D": 6, "P": 5, "L": 1},
            attributes={"weights": drawn(15), "frequencies": TURNS, "threshold": 1e6, "recent": 2},
        ),
    ),
    tolerance=Tolerance(
        atol=2e-5,
        rtol=2e-5,
        reason="fp32 sums in another order; no score of a case is within that of its threshold, so budgets are equal",
    ),
)
