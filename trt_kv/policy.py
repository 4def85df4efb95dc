"""A policy is score x budget x residency.

* **score** ranks the cached tokens of a layer;
* **budget** says how many of them a layer keeps (always the KEPT part);
* **residency** says what happens to the others: ``dropped``, or (with FreeKV) paged to the host.

Named policies are presets of these three; each stands in its own file in ``trt_kv/policies``.
"""

import dataclasses
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trt_kv.errors import UnknownNameError, UsageError

SCORES = {
    "none": "no ranking: every token is kept",
    "mass": "attention mean over query heads, summed over all prompt queries (published PrefixKV)",
    "window": "attention mean over query heads, summed over the last `window` prompt queries (observation window)",
}
BUDGETS = {
    "full": "every layer keeps every token",
    "uniform": "every layer keeps the same share",
    "recipe": "each layer keeps the share that a calibrated recipe gives it",
}
RESIDENCIES = {"dropped": "tokens outside the budget are dropped and their memory returns to the pool"}


@dataclass(frozen=True, kw_only=True)
class Policy:
    """Which tokens each layer keeps.

    ``kept`` is the mean kept share over layers in (0, 1]. ``window`` is the observation window in queries (score ``window``
    only). ``sinks`` first and ``recent`` last prompt tokens are never evicted (published PrefixKV: 1 and 1).
    ``decode_distance``: while decoding, the row evicted for a new token stands this many rows before the end of the
    compressed prompt (published: 25).
    """

    name: str
    summary: str
    score: str = "none"
    budget: str = "full"
    residency: str = "dropped"
    kept: float = 1.0
    window: int = 32
    sinks: int = 1
    recent: int = 1
    decode_distance: int = 25

    def __post_init__(self) -> None:
        for kind, value, known in (
            ("score", self.score, SCORES),
            ("budget", self.budget, BUDGETS),
            ("residency", self.residency, RESIDENCIES),
        ):
            if value not in known:
                raise UnknownNameError(kind, value, known)
        if not 0.0 < self.kept <= 1.0:
            raise UsageError(
                "the budget is the share of tokens to keep",
                got=self.kept,
                expected="a number in (0, 1]",
                fix="e.g. --budget 0.5",
            )
        for field in ("window", "decode_distance"):
            if getattr(self, field) < 1:
                raise UsageError(f"{field} counts tokens", got=getattr(self, field), expected="an integer >= 1")
        for field in ("sinks", "recent"):
            if getattr(self, field) < 0:
                raise UsageError(f"{field} counts tokens", got=getattr(self, field), expected="an integer >= 0")
        if (self.score == "none") != (self.budget == "full"):
            raise UsageError(
                f"policy {self.name!r} combines score {self.score!r} with budget {self.budget!r}",
                expected="score 'none' exactly with budget 'full': a smaller budget needs a ranking, and a full one ignores it",
            )
        if self.budget == "full" and self.kept != 1.0:
            raise UsageError(
                "budget 'full' keeps everything", got=self.kept, expected=1.0, fix="choose another policy or budget 1"
            )

    @property
    def evicts(self) -> bool:
        """Whether any token may ever be evicted."""
        return self.budget != "full"

    @property
    def needs_recipe(self) -> bool:
        return self.budget == "recipe"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Policy":
        """Read what ``to_json`` wrote; an unknown field is an error, because ignoring it would change what is kept."""
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise UsageError("a policy has fields this version does not know", got=unknown, expected=sorted(known))
        return cls(**data)


def kept_tokens(n_cached: int, kept_share: float) -> int:
    """How many of ``n_cached`` tokens a share in (0, 1] keeps: n - round((1 - share) * n), halves to the even neighbour.

    The share is taken in fp32, as it stands on a node of the graph, so that a recipe and its engine never differ by a token.
    """
    share_on_node: float = struct.unpack("f", struct.pack("f", kept_share))[0]
    return n_cached - round((1.0 - share_on_node) * n_cached)
