"""How a sequence's pages divide into sinks, choosable ones and the newest: arithmetic shared by all implementations."""

from dataclasses import dataclass

from trt_kv.layer_budget import LayerBudget
from trt_kv.program import Program, recall_nodes

DEVIATION, CODES = 1, 2
"""Values of the attribute ``summary``: bounds are midpoint and mean deviation; keys have codes."""
CODED_TOKENS = 8
"""Tokens whose codes are stored together (``key_codes.py``)."""
CODING = 4
"""One in so many channels, rounded up, is read of the codes: those in which the query is large."""


def summary_rows(summary: int, page_size: int, kv_dtype: str) -> int:
    """R: rows that the summary of a page-head takes: lo and hi, and those of its codes if there are any."""
    per_group = 2 if kv_dtype == "int8" else 1
    return 2 + (per_group * -(-page_size // CODED_TOKENS) if summary == CODES else 0)


def rows_of_layers(program: Program, page_size: int, kv_dtype: str) -> list[int]:
    """Of each layer: ``summary_rows``; 0 if it does not recall."""
    return [
        0 if node is None else summary_rows(int(node.attributes["summary"]), page_size, kv_dtype)
        for node in recall_nodes(program)
    ]


def most_rows(program: Program, page_size: int, kv_dtype: str) -> int:
    """R of a state that all layers share; 0 if none recalls."""
    return max(rows_of_layers(program, page_size, kv_dtype), default=0)


@dataclass(frozen=True, kw_only=True)
class PageLimits:
    """A layer's attributes in pages: ``n_sinks`` first ones, at most ``n_newest`` last ones."""

    page_size: int
    sinks: int
    recent: int

    @property
    def n_sinks(self) -> int:
        return -(-self.sinks // self.page_size)

    @property
    def n_newest(self) -> int:
        """The most pages that ``recent`` consecutive tokens can touch."""
        return -(-(self.recent - 1) // self.page_size) + 1

    def n_chosen(self, budget: int) -> int:
        """Number of pages besides sinks and newest that a budget of tokens has room for."""
        return max(0, budget // self.page_size - self.n_sinks - self.n_newest)

    def n_most(self, budget: int) -> int:
        """The most pages that one step may attend to."""
        return self.n_sinks + self.n_newest + self.n_chosen(budget)

    def first_newest(self, n_tokens: int) -> int:
        """The first of the newest pages of a sequence of ``n_tokens``."""
        return max(0, n_tokens - self.recent) // self.page_size

    def choosable(self, n_tokens: int) -> range:
        """The pages between sinks and newest. All of them were full before the last token was appended."""
        return range(self.n_sinks, max(self.n_sinks, self.first_newest(n_tokens)))


def budget_tokens(prompt_len: int, adaptive_budget: int, kept_share: float, kept_tokens: int) -> int:
    """Tokens that one step may attend to: the sequence's adaptive budget if there is one, else that of the attributes."""
    if adaptive_budget >= 0:
        return adaptive_budget
    return LayerBudget(share=kept_share, tokens=kept_tokens).of_prompt(prompt_len)
