"""Settings of a quality report."""

from dataclasses import dataclass

from benchmarks.quality.cell import Cell
from trt_kv.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class ContextPlan:
    """Measurements at one context length, in tokens.

    Each task gets ``documents_per_seed`` documents for each seed; policies of the groups ``groups`` are measured at the mean
    kept shares ``budgets``, or once if their budget is adaptive.
    """

    context_length: int
    documents_per_seed: int
    budgets: tuple[float, ...]
    groups: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of a report. Lengths are in tokens.

    ``main_context`` is the context of most tables. ``seeds`` draw the documents (and the tokens kept by random policies).
    ``follow_up_facts``: facts in the documents whose question comes after eviction; ``most_facts``: facts, or distractors, in
    the documents that have many, fewer if the context is short (``n_many``). The model can do a task if it answers at least
    the share ``capable_from`` exactly with its full cache.
    """

    contexts: tuple[ContextPlan, ...]
    main_context: int
    seeds: tuple[int, ...]
    follow_up_facts: int
    most_facts: int
    cue_length: int
    copy_length: int
    text_answer_length: int
    capable_from: float
    calibration_samples: int
    calibration_context: int
    calibration_seed: int

    def __post_init__(self) -> None:
        lengths = [plan.context_length for plan in self.contexts]
        if self.main_context not in lengths or len(set(lengths)) != len(lengths):
            raise UsageError("the main context is not among the contexts", got=self.main_context, expected=f"one of {lengths}")
        if len(self.seeds) * min(plan.documents_per_seed for plan in self.contexts) < 2:
            raise UsageError("one document gives no interval", expected="at least 2 documents per task")

    @property
    def main(self) -> ContextPlan:
        """The plan of the main context."""
        return self.at(self.main_context)

    @property
    def budgets(self) -> tuple[float, ...]:
        """The mean kept shares of the main context, smallest first."""
        return self.main.budgets

    @property
    def summary_budget(self) -> float:
        """The kept share of summaries that show only one."""
        return min(self.budgets, key=lambda budget: abs(budget - 0.2))

    def at(self, context_length: int) -> ContextPlan:
        """The plan of a context."""
        return next(plan for plan in self.contexts if plan.context_length == context_length)

    def can(self, cell: Cell, *, asks: bool) -> bool:
        """Whether the model can do a cell's task with its full cache; true for tasks without a right answer."""
        return not asks or cell.full.accuracy.value >= self.capable_from

    def n_many(self, context_length: int) -> int:
        """Facts, or distractors, in documents that have many: at most one per 32 tokens."""
        return min(self.most_facts, context_length // 32)
