"""How much of a real model is measured."""

from dataclasses import dataclass

from trt_kv.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class LengthPlan:
    """Documents of each family at a length in tokens, and the shares that policies keep there."""

    n_tokens: int
    n_documents: int
    budgets: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class TalkPlan:
    """Several questions, one after another, about one document; ``n_documents`` documents of ``n_tokens`` with ``n_turns``."""

    n_tokens: int
    n_documents: int
    n_turns: int
    budgets: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class RealSettings:
    """``lengths``: the main one first. ``recall_budgets``: shares that a step attends to, if the cache is on the host.
    A family is compared at a length if the full cache has at least the mean mark ``capable_from``.
    ``text_tokens`` of plain text are predicted after a prompt of the main length, of ``n_texts`` texts.
    """

    lengths: tuple[LengthPlan, ...]
    recall_budgets: tuple[float, ...]
    capable_from: float
    n_texts: int
    text_tokens: int
    talk: TalkPlan
    calibration_samples: int
    calibration_tokens: int
    calibration_seed: int

    def __post_init__(self) -> None:
        if not self.lengths or len({plan.n_tokens for plan in self.lengths}) != len(self.lengths):
            raise UsageError("bad lengths", got=self.lengths, expected="one plan for each of several lengths")

    @property
    def budgets(self) -> tuple[float, ...]:
        """Every kept share of the report, largest first."""
        found = {budget for plan in self.lengths for budget in plan.budgets} | set(self.talk.budgets)
        return tuple(sorted(found, reverse=True))

    @property
    def main(self) -> LengthPlan:
        return self.lengths[0]

    def at(self, n_tokens: int) -> LengthPlan:
        """The plan of a length."""
        return next(plan for plan in self.lengths if plan.n_tokens == n_tokens)
