"""A score: how the tokens or pages of a layer are ranked. Each score has its own file in ``trt_kv/scores``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from trt_kv.errors import UsageError

if TYPE_CHECKING:
    from trt_kv.opspec import AttributeValue
    from trt_kv.policy import Policy

Ranked = Literal["nothing", "tokens", "pages"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score; ``UsageError`` unless exactly one of ``token_scores``, ``predicts`` and ``ranking`` is set for tokens, and
    none otherwise.

    ``ranks``: cached tokens, for eviction; pages, for recall, by the bounds of a policy's ``page_summary`` and
    ``group_pooling``; or nothing, for policies that keep everything. A score of tokens is accumulated attention, a
    prediction or an order:

    * ``token_scores`` returns the attributes of TokenScores that this score sets: ``window`` and ``average``, 0 if left out;
      the policy's ``heads``, ``pooling`` and ``decode`` set the others. None: the score reads no attention.
    * ``predicts``: PredictedScores computes it from keys and values, with the weights of a recipe.
    * ``ranking`` is the attribute of that name of EvictTokens, and of AdaptiveBudget if the policy's ``metric_order`` is
      "ranking": 0 by the result of TokenScores, 1 newest first, 2 random.

    ``settings`` names the fields of a policy that this score reads and others do not. ``check`` raises ``UsageError`` for an
    invalid policy with this score; ranges, and what budget and residency require of any score, are checked elsewhere.
    """

    name: str
    summary: str
    ranks: Ranked = "tokens"
    token_scores: "Callable[[Policy], Mapping[str, AttributeValue]] | None" = None
    predicts: bool = False
    ranking: int = 0
    settings: tuple[str, ...] = ()
    check: "Callable[[Policy], None]" = lambda _: None

    def __post_init__(self) -> None:
        if self.ranks not in get_args(Ranked):
            raise UsageError(f"score {self.name!r} has an unknown value of ranks", got=self.ranks, expected=get_args(Ranked))
        if self.reads_attention + self.predicts + (self.ranking != 0) != (self.ranks == "tokens"):
            raise UsageError(
                f"score {self.name!r} has no unique ranking",
                got=f"ranks {self.ranks!r}, ranking {self.ranking}, {'' if self.reads_attention else 'no '}token_scores, "
                f"predicts {self.predicts}",
                expected="either token_scores, predicts or a ranking other than 0 if tokens are ranked, else none",
            )

    @property
    def reads_attention(self) -> bool:
        """Whether the ranking is computed from attention weights."""
        return self.token_scores is not None
