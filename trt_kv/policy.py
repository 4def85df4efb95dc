"""A policy is score x budget x residency, and what it does while decoding.

* **score** ranks the cached tokens of a layer, for all KV heads together or for each on its own; each score has its own file in
  ``trt_kv/scores``;
* **budget** says how many of them a layer keeps (always the KEPT part);
* **residency** says what happens to the other tokens: ``dropped``, or kept on the ``host`` and recalled page by page (FreeKV);
* **decode** says what happens while more tokens are generated.

Named policies are presets of these, each in its own file in ``trt_kv/policies``.
"""

import dataclasses
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trt_kv.errors import UsageError
from trt_kv.json_file import dataclass_from_json
from trt_kv.policy_checks import check_policy
from trt_kv.score import Score
from trt_kv.scores import score_from_name

BUDGETS = {
    "full": "every layer keeps every token",
    "uniform": "every layer keeps the same share",
    "constant": "every layer keeps `tokens` tokens, however long the prompt is (recalled ones in whole pages)",
    "pyramid": "shares fall linearly from the first layer to the last (PyramidKV); their mean is the kept share",
    "recipe": "each layer keeps the share that a calibrated recipe gives it (PrefixKV)",
    "unimetric": "each layer keeps tokens that hold 1 - `threshold` of the attention norm, computed per input (ReFreeKV)",
}
DEFAULT_FLOOR = 256
"""``floor`` of the presets that evict, except ``prefixkv_paper``."""
RESIDENCIES = {
    "dropped": "tokens outside the budget are evicted, and their pages return to the pool",
    "host": "every token stays in host memory; a step attends to sinks, the newest tokens and the pages recalled for it",
}
HEADS = {
    "shared": "one ranking per layer: attention is averaged over all query heads",
    "each": "one ranking per KV head: attention is averaged over its query heads",
    "own": "one ranking, one budget and pages of its own for each KV head, which then may keep less than the others (CPU only)",
}
DECODES = {
    "keep": "every generated token is kept",
    "row": "at the kept share, evict the token `decode_distance` before the end of the kept prompt (published PrefixKV)",
    "rank": "generated tokens join the ranking, and each of them evicts the lowest-ranked token",
    "draw": "beyond `draw_tokens` generated tokens, pages of them are drawn at random and freed, never the prompt's",
}
EVICTS = {
    "after_reading": "once, when the whole prompt has been read, as in the papers",
    "while_reading": "after each chunk too, down to the prompt's budget and `reserve` tokens, which bound the memory",
}
METRIC_ROWS = {
    "query": "the attention of the last prompt query, per query head (published ReFreeKV)",
    "scores": "the scores themselves, per KV head: with score window the attention of the last `window` queries",
}
METRIC_ORDERS = {
    "ranking": "the norm is accumulated along the policy's own ranking (published ReFreeKV, whose ranking is position)",
    "position": "the norm is accumulated from the newest token back, whatever the ranking of tokens is",
}
NORMS = {
    "sinks_out": "protected tokens do not count in the norm (ReFreeKV's released code)",
    "sinks_in": "protected tokens count in the norm (ReFreeKV's paper)",
}
PAGE_SUMMARIES = {
    "minmax": "smallest and largest value of each channel of a page's keys (Quest, FreeKV)",
    "deviation": "middle between smallest and largest, plus and minus the mean absolute deviation from it (ArkVale)",
    "codes": "as minmax, and two bits per channel of each key: pages are ranked by their best key, of which a quarter is read",
}
GROUP_POOLINGS = {
    "mean_softmax": "mean over a KV head's query heads of the softmax over pages (MeanS, FreeKV)",
    "max_softmax": "maximum over a KV head's query heads of the softmax over pages (MaxS)",
    "mean_raw": "mean over a KV head's query heads of the bounds themselves (MeanQK, ArkVale)",
    "max_raw": "maximum over a KV head's query heads of the bounds themselves (MaxQK, Quest)",
}
DRIFTS = {
    "fixed": "`tau` in every layer",
    "calibrated": "a `tau` for each layer, measured on prompts so that heads are corrected at a given rate",
}

NAMES = {
    "budget": BUDGETS,
    "residency": RESIDENCIES,
    "heads": HEADS,
    "evict": EVICTS,
    "decode": DECODES,
    "metric_row": METRIC_ROWS,
    "metric_order": METRIC_ORDERS,
    "norm": NORMS,
    "page_summary": PAGE_SUMMARIES,
    "group_pooling": GROUP_POOLINGS,
    "drift": DRIFTS,
}
"""The fields of a policy whose values are names, and what each name means; except ``score``, whose names are ``score_names()``.
"""


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which tokens each layer keeps; ``UsageError`` for an invalid combination.

    ``kept``: mean kept share over the layers that are not exempt, in (0, 1]; 1 if the budget does not read it. ``tokens``:
    budget "constant" only. ``floor``: a layer that holds at most so many tokens evicts none of them, whatever its budget (0: as
    in the papers). ``window``: observation window in queries, for scores that read it. ``pooling``: width of the mean that
    smooths scores over neighbours, odd, 1 for none. ``sinks`` first and ``recent`` last prompt tokens are never evicted, nor is
    the newest ``recent_share`` of a budget. ``reserve``: evict "while_reading" only. ``decode_distance``: decode "row" only.
    ``exempt_layers`` keep everything. ``threshold``, ``metric_row``, ``metric_order``, ``norm``: budget "unimetric" only.
    ``beta``: budget "pyramid" only, the steepness (1: flat). ``seed``: score "random" and decode "draw" only. ``draw_tokens``,
    ``draw_extreme``: decode "draw" only, generated tokens that each layer holds beside the prompt, in whole pages, and the
    share of their pages that stay because they hold the widest values. Defaults are published PrefixKV's and ReFreeKV's.

    Residency "host" only: budgets count what one step attends to, ``sinks`` and ``recent`` included, in whole pages. A KV head
    whose query is less like the one before than ``tau`` (cosine) selects its pages again before it attends; above 1 every head
    does in every step, below -1 no head ever does. ``page_summary`` and ``group_pooling`` say how pages are ranked,
    ``softmax_scale`` is the factor on bounds before a softmax over pages (1, as published; head_size ** -0.5 would be
    attention's own).
    """

    name: str
    summary: str
    score: str = "none"
    budget: str = "full"
    residency: str = "dropped"
    kept: float = 1.0
    tokens: int = 0
    floor: int = 0
    heads: str = "shared"
    window: int = 32
    pooling: int = 1
    sinks: int = 1
    recent: int = 1
    recent_share: float = 0.0
    evict: str = "after_reading"
    reserve: int = 0
    decode: str = "row"
    decode_distance: int = 25
    exempt_layers: tuple[int, ...] = ()
    threshold: float = 0.01
    metric_row: str = "query"
    metric_order: str = "ranking"
    norm: str = "sinks_out"
    beta: float = 20.0
    seed: int = 0
    tau: float = 0.8
    drift: str = "fixed"
    page_summary: str = "minmax"
    group_pooling: str = "mean_softmax"
    softmax_scale: float = 1.0
    draw_tokens: int = 0
    draw_extreme: float = 0.0

    def __post_init__(self) -> None:
        check_policy(self, NAMES)

    @property
    def evicts(self) -> bool:
        """Whether any token may ever be evicted."""
        return self.budget != "full" and not self.recalls

    @property
    def draws(self) -> bool:
        """Whether pages of generated tokens are freed at random."""
        return self.decode == "draw"

    @property
    def eviction_floor(self) -> int:
        """As many tokens as a layer may hold without any being evicted: ``floor``, or a constant budget that exceeds it."""
        return max(self.floor, self.tokens) if self.evicts else 0

    @property
    def reading_reserve(self) -> int | None:
        """Tokens that a layer holds beyond its budget between two chunks of a prompt; None: it holds the whole prompt."""
        return self.reserve if self.evicts and self.evict == "while_reading" else None

    @property
    def recalls(self) -> bool:
        """Whether the cache stays on the host and pages of it are recalled."""
        return self.residency == "host"

    @property
    def needs_recipe(self) -> bool:
        return self.budget == "recipe"

    @property
    def needs_drift(self) -> bool:
        """Whether each layer's tau is calibrated."""
        return self.recalls and self.drift == "calibrated"

    @property
    def scoring(self) -> Score:
        """The score whose name is ``score``."""
        return score_from_name(self.score)

    @property
    def reads_attention(self) -> bool:
        """Whether the ranking is made from attention weights."""
        return self.scoring.reads_attention

    def applied_to(self, windows: Sequence[int]) -> "Policy":
        """What this policy decides in a model whose layers have these attention ``windows`` (0: none; empty: no layer has one).

        A layer with a window keeps its window, so it is exempt. If no layer is left, this is a full policy of the same name.
        """
        windowed = {layer for layer, window in enumerate(windows) if window}
        if not windowed or not (self.evicts or self.recalls):
            return self
        exempt = windowed | set(self.exempt_layers)
        if exempt >= set(range(len(windows))):
            return Policy(name=self.name, summary=self.summary)
        return dataclasses.replace(self, exempt_layers=tuple(sorted(exempt)))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: object) -> "Policy":
        """Read what ``to_json`` wrote; an unknown field is an error, because ignoring it would change what is kept."""
        return dataclass_from_json(cls, data, where="the policy", error=UsageError, with_defaults=True)


def kept_tokens(n_cached: int, kept_share: float, tokens: int = 0, floor: int = 0) -> int:
    """How many of ``n_cached`` tokens a budget keeps: n - round((1 - share) * n) + ``tokens``, at least ``floor``, at most n.

    Halves are rounded to even. The share is taken in fp32, as in the graph's attributes, so that a recipe and its
    engine never differ by a token.
    """
    share_on_node: float = struct.unpack("f", struct.pack("f", kept_share))[0]
    return min(n_cached, max(floor, tokens + n_cached - round((1.0 - share_on_node) * n_cached)))
