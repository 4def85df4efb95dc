"""RecallAttention: generated tokens attend to sinks, the newest tokens and the pages that their KV head has chosen.

The op defines which tokens are attended to. Where pages are stored and when they are moved is left to the implementation:
``cpu.py`` reads the pool in place, ``trt_kv.runtime.backends.host.recall`` keeps the pool on the host and moves pages, with
the same results.
"""

from trt_kv.opspec import AttributeSpec, Case, OpSpec, TensorSpec, Tolerance
from trt_kv.plugins import tensors as t

DIMS = {"H": 6, "K": 3, "D": 10, "P": 4, "L": 2}
LONG = {"kept_tokens": 24, "sinks": 3, "recent": 5}
DECODING = {"prompt_remaining": (-1, -1, -1)}

SPEC = OpSpec(
    name="RecallAttention",
    summary=(
        "Write k and v to their slots. A sequence's tokens are in its page table in order of position, without gaps. "
        "Prompt tokens (prompt_remaining >= 0) attend to all tokens up to themselves. A generated token, of which a "
        "sequence has at most one per step, attends in each KV head to whole pages j of its n tokens: those with one of the "
        "first `sinks` tokens, those with one of the last `recent` tokens (pages from w = max(0, n - recent) // P on), and "
        "the best of the pages in between, as many as the budget has room for: budget // P - ceil(sinks / P) - "
        "(ceil((recent - 1) / P) + 1), at least 0. The budget is adaptive_budget if that is not negative, else "
        "kept_tokens + prompt_len - round((1 - kept_share) * prompt_len). Pages are ranked for the probe, the query in "
        "last_query of the token before. If the mean over a KV head's query heads of cos(q, last_query) is not at least "
        "tau, that KV head is corrected and its probe is q itself. The bound of page j for query head h is sum_d "
        "max(probe_d lo_d, probe_d hi_d) with lo and hi from the page's summary; `pooling` makes one value per KV head of "
        "the bounds of its query heads: 0 their mean and 1 their maximum after softmax(softmax_scale * bound) over the "
        "pages in between, 2 their mean and 3 their maximum without softmax. Ties go to the lower page. A page gets its "
        "summary when it is full: `summary` 0 the minimum and maximum of its keys per channel, 1 the midpoint of these minus "
        "and plus the mean absolute deviation from the midpoint, 2 as 0. With 2 a page has an estimate instead of the bound, "
        "the largest over its keys of sum_d probe_d * (lo_d + x_d * (hi_d - lo_d)). In the ceil(D / 4) channels with the "
        "largest sum of squares of the KV head's probes, lower channels first, 3 x_d is the key's place between the page's "
        "smallest and largest key, rounded to an integer; in the other channels x_d is 1 / 2. Afterwards last_query holds the "
        "query of each sequence's "
        "last token of this step. All of this is computed in fp32 or better. A soft cap applies to the logits of attention; "
        "bounds have none: tanh is monotone, so a query head ranks pages as it would by bounds of capped logits."
    ),
    source=(
        "FreeKV (arXiv 2505.13109, section 4): speculative retrieval with the last query, correction per KV head, group- "
        "consistent selection; bounds and summaries of Quest (arXiv 2406.10774), ArkVale's as summary 1; codes of keys per "
        "channel as in KIVI (arXiv 2402.02750), of the channels where the query is large as in SparQ (arXiv 2312.04985)"
    ),
    inputs=(
        t.Q,
        t.K,
        t.V,
        t.POSITIONS,
        t.CU_TOKENS,
        TensorSpec(
            name="prompt_remaining",
            axes=("N",),
            dtype="int64",
            doc="prompt tokens that follow this one; -1 for a token that is not of the prompt",
        ),
        t.SLOTS,
        t.PAGE_TABLE,
        t.KV_LEN,
        TensorSpec(name="prompt_len", axes=("B",), dtype="int64", doc="prompt tokens of the sequence that have been prefilled"),
        TensorSpec(
            name="adaptive_budget",
            axes=("L", "B"),
            dtype="int64",
            doc="tokens a step may attend to, from AdaptiveBudget; -1: kept_share and kept_tokens apply",
        ),
        TensorSpec(
            name="query_rows",
            axes=("L", "B"),
            dtype="int64",
            doc="the row of last_query that belongs to the layer and sequence",
        ),
        t.KV,
        t.TOKEN_POSITIONS,
        TensorSpec(
            name="summaries",
            axes=("M", "K", "S", "D"),
            dtype="float",
            doc="lo and hi of the keys in each full page-head, and in further rows, if it has them, an implementation's codes",
            state=True,
        ),
        TensorSpec(
            name="last_query", axes=("U", "H", "D"), dtype="float", doc="queries of the last tokens, rotated", state=True
        ),
    ),
    outputs=(
        TensorSpec(name="out", axes=("N", "H", "D"), dtype="float", doc="attention output"),
        t.LSE,
        TensorSpec(
            name="corrected", axes=("B", "K"), dtype="int64", doc="1 where a KV head chose pages with this step's query"
        ),
    ),
    attributes=(
        t.LAYER,
        t.SCALE,
        t.PAGE_SIZE,
        AttributeSpec(name="kept_share", type="float", doc="share of the prompt that a step may attend to", default=1.0),
        AttributeSpec(name="kept_tokens", type="int", doc="tokens on top of the share", default=0),
        AttributeSpec(name="sinks", type="int", doc="first tokens that are always attended to", default=0),
        AttributeSpec(name="recent", type="int", doc="last tokens that are always attended to, at least 1", default=1),
        AttributeSpec(name="tau", type="float", doc="cosine below which a KV head is corrected, taken in fp32", default=0.8),
        AttributeSpec(
            name="summary",
            type="int",
            doc="0: minimum and maximum; 1: midpoint and mean deviation; 2: as 0, with codes of the keys",
            default=0,
        ),
        AttributeSpec(name="pooling", type="int", doc="0 MeanS, 1 MaxS, 2 MeanQK, 3 MaxQK", default=0),
        AttributeSpec(name="softmax_scale", type="float", doc="factor on bounds before the softmax over pages", default=1.0),
        t.SOFT_CAP,
    ),
    cases=(
        Case(
            name="decode",
            cached=(50, 61, 39),
            new=(1, 1, 1),
            dims=DIMS,
            attributes={**LONG, "kept_share": 0.0, "tau": 0.0},
            values=DECODING,
            in_order=True,
        ),
        Case(
            name="never_corrected",
            cached=(31, 2, 47),
            new=(1, 1, 1),
            dims={"H": 10, "K": 5, "D": 3, "P": 3, "L": 1},
            attributes={"kept_share": 0.4, "sinks": 2, "recent": 3, "tau": -1.01, "pooling": 2},
            values=DECODING | {"prompt_len": (30, 1, 40)},
            in_order=True,
        ),
        Case(
            name="always_corrected",
            cached=(44, 60),
            new=(1, 1),
            dims={"H": 4, "K": 2, "D": 14, "P": 5, "L": 3},
            attributes={"kept_share": 0.0, "kept_tokens": 31, "recent": 1, "tau": 1.01, "pooling": 3},
            values={"prompt_remaining": (-1, -1)},
            in_order=True,
        ),
        Case(
            name="prefill",
            cached=(0,),
            new=(23,),
            dims={"H": 4, "K": 2, "D": 6, "P": 5, "L": 1},
            values={"prompt_remaining": tuple(range(22, -1, -1))},
            in_order=True,
        ),
        Case(
            name="chunk_fills_pages",
            cached=(17,),
            new=(9,),
            dims={"H": 3, "K": 1, "D": 14, "P": 8, "L": 3},
            attributes={"summary": 1},
            values={"prompt_remaining": tuple(range(11, 2, -1))},
            in_order=True,
        ),
        Case(
            name="prompts_beside_generated_tokens",
            cached=(0, 41, 30, 55),
            new=(7, 1, 5, 1),
            dims={"H": 10, "K": 5, "D": 3, "P": 7, "L": 2},
            attributes={"kept_share": 0.0, "kept_tokens": 35, "sinks": 1, "recent": 2, "tau": 0.3, "pooling": 1},
            values={"prompt_remaining": (6, 5, 4, 3, 2, 1, 0, -1, 4, 3, 2, 1, 0, -1), "prompt_len": (7, 20, 35, 55)},
            in_order=True,
        ),
        Case(
            name="one_token_of_a_prompt",
            cached=(30, 33),
            new=(1, 1),
            dims=DIMS,
            attributes={**LONG, "kept_share": 0.0},
            values={"prompt_remaining": (0, -1)},
            in_order=True,
        ),
        Case(
            name="budgets_found",
            cached=(57, 51),
            new=(1, 1),
            dims={"H": 7, "K": 7, "D": 5, "P": 3, "L": 2},
            attributes={"sinks": 4, "recent": 4, "softmax_scale": 0.3},
            values={"prompt_remaining": (-1, -1), "adaptive_budget": (0, 0, 30, -1)},
            in_order=True,
        ),
        Case(
            name="deviation_page_fills",
            cached=(35, 63, 20),
            new=(1, 1, 1),
            dims={"H": 4, "K": 2, "D": 6, "P": 12, "L": 2},
            attributes={
                "kept_share": 0.0,
                "kept_tokens": 48,
                "sinks": 12,
                "recent": 12,
                "summary": 1,
                "pooling": 2,
                "tau": 0.2,
            },
            values=DECODING,
            in_order=True,
        ),
        Case(
            name="no_room_to_recall",
            cached=(40,),
            new=(1,),
            dims=DIMS,
            attributes={"kept_share": 0.0, "kept_tokens": 8, "sinks": 4, "recent": 4},
            values={"prompt_remaining": (-1,)},
            in_order=True,
        ),
        Case(
            name="equal_pages",
            cached=(40,),
            new=(1,),
            dims=DIMS,
            attributes={"kept_share": 0.0, "kept_tokens": 24, "sinks": 4, "recent": 4, "pooling": 3},
            values={"prompt_remaining": (-1,), "summaries": (0.0,)},
            in_order=True,
        ),
        Case(
            name="no_query_before",
            cached=(40,),
            new=(1,),
            dims=DIMS,
            attributes={"kept_share": 0.0, "kept_tokens": 24, "sinks": 4, "recent": 4, "tau": -1.01, "pooling": 3},
            values={"prompt_remaining": (-1,), "last_query": (0.0,)},
            in_order=True,
        ),
        Case(
            name="one_sequence_waits",
            cached=(30, 33, 22),
            new=(1, 0, 1),
            dims=DIMS,
            attributes={**LONG, "kept_share": 0.0},
            values={"prompt_remaining": (-1, -1)},
            in_order=True,
        ),
        Case(
            name="many_layers",
            cached=(24, 13),
            new=(1, 1),
            dims={"H": 2, "K": 1, "D": 6, "P": 4, "L": 11},
            attributes={"kept_share": 0.0, "kept_tokens": 12, "recent": 2},
            values={"prompt_remaining": (-1, -1)},
            in_order=True,
        ),
        Case(
            name="large_pages",
            cached=(150,),
            new=(1,),
            dims={"H": 4, "K": 2, "D": 6, "P": 37, "L": 1},
            attributes={"kept_share": 0.0, "kept_tokens": 111, "recent": 1},
            values={"prompt_remaining": (-1,)},
            in_order=True,
        ),
        Case(
            name="codes",
            cached=(50, 61, 39),
            new=(1, 1, 1),
            dims=DIMS,
            attributes={**LONG, "kept_share": 0.0, "tau": 0.0, "summary": 2, "pooling": 3},
            values=DECODING,
            in_order=True,
        ),
        Case(
            name="codes_of_large_pages",
            cached=(0, 95, 131),
            new=(12, 1, 1),
            dims={"H": 10, "K": 2, "D": 9, "P": 12, "L": 2},
            attributes={"kept_share": 0.0, "kept_tokens": 60, "sinks": 3, "recent": 4, "tau": 0.3, "summary": 2},
            values={"prompt_remaining": (*range(11, -1, -1), -1, -1), "prompt_len": (12, 90, 100)},
            in_order=True,
        ),
        Case(
            name="soft_cap",
            cached=(0, 41, 30, 55),
            new=(7, 1, 5, 1),
            dims={"H": 10, "K": 5, "D": 3, "P": 7, "L": 2},
            attributes={"kept_share": 0.0, "kept_tokens": 35, "sinks": 1, "recent": 2, "tau": 0.3, "soft_cap": 0.5},
            values={"prompt_remaining": (6, 5, 4, 3, 2, 1, 0, -1, 4, 3, 2, 1, 0, -1), "prompt_len": (7, 20, 35, 55)},
            in_order=True,
        ),
    ),
    tolerance=Tolerance(
        atol=2e-5,
        rtol=2e-5,
        reason="fp32 sums of up to a few dozen products in another order; choices differ only in near ties",
    ),
)
