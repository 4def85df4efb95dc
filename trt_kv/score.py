"""What a score is: how the tokens or pages of a layer are ranked. Each score stands in its own file in ``trt_kv/scores``."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from trt_kv.errors import UsageError

if TYPE_CHECKING:
    from trt_kv.policy import Policy
    from trt_kv.program import AttributeValue

Ranked = Literal["nothing", "tokens", "pages"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """One score; ``UsageError`` for one that ranks tokens by nothing, or by two things at once.

    ``ranks``: cached tokens, for eviction; pages, for recall, whose bounds a policy's ``page_summary`` and ``group_pooling``
    choose; or nothing, for policies that keep everything. A score of tokens is either accumulated attention or an order:

    * ``token_scores`` makes the attributes of TokenScores that this score sets, of those that ``heads``, ``pooling`` and
      ``decode`` of the policy do not set: ``window`` and ``average``, 0 where it leaves them out. None: it reads no attention.
    * ``ranking`` is that attribute of EvictTokens, and of AdaptiveBudget where the policy's ``metric_order`` is "ranking": 0 by
      the result of TokenScores, 1 newest first, 2 by lots.

    ``settings`` names the fields of a policy that are read by this score and not by every one. ``check`` raises ``UsageError``
    for a policy with this score that would mean nothing; its own values, and what its budget and residency ask of any score,
    are checked without it.
    """

    name: str
    summary: str
    ranks: Ranked = "tokens"
    token_scores: "Callable[[Policy], Mapping[str, AttributeValue]] | None" = None
    ranking: int = 0
    settings: tuple[str, ...] = ()
    check: "Callable[[Policy], None]" = lambda _: None

    def __post_init__(self) -> None:
        if self.ranks not in get_args(Ranked):
            raise UsageError(f"score {self.name!r} ranks something unknown", got=self.ranks, expected=get_args(Ranked))
        if self.reads_attention + (self.ranking != 0) != (self.ranks == "tokens"):
            raise UsageError(
                f"score {self.name!r} does not say what it ranks by",
                got=f"ranks {self.ranks!r}, ranking {self.ranking}, {'' if self.reads_attention else 'no '}token_scores",
                expected="either token_scores or a ranking other than 0 where tokens are ranked, else neither",
            )

    @property
    def reads_attention(self) -> bool:
        """Whether the ranking is made from attention weights."""
        return self.token_scores is not None
