"""What is asked of the model: a context that is read, and questions about it, each with the references of a right answer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trt_kv.errors import UsageError

Encode = Callable[[str], list[int]]
Marking = Literal["share", "records"]
"""How an answer is marked: ``marking.share_found`` or ``marking.records_found``."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question. ``context``: the text that is read first; ``said``: text that counts as generated, fed token by token
    after it; ``question``: what comes then; ``prefix``: the first words of the answer, which are given too (RULER's answer
    prefix) and of which ``begun``, at their end, counts as answered.

    ``references``: what a right answer contains. ``n_new``: tokens that it may take, up to the text ``stop``. ``document``:
    items of one document share their text, so they are no independent samples.
    """

    document: int
    context: str
    question: str
    prefix: str
    references: tuple[str, ...]
    n_new: int
    said: str = ""
    begun: str = ""
    stop: str = "\n"
    marking: Marking = "share"

    def __post_init__(self) -> None:
        if not self.references or self.n_new < 1:
            raise UsageError("a question needs a right answer", got=f"{self.references}, {self.n_new} new tokens")


def fitted(fill: Callable[[int], str], encode: Encode, room: int) -> str:
    """The longest of ``fill(1)``, ``fill(2)``, ... with at most ``room`` tokens; ``fill`` must grow with its argument.

    ``UsageError`` if even the first is too long. As RULER fits its haystacks to a length.
    """
    n_tokens = len(encode(fill(1)))
    if n_tokens > room:
        raise UsageError("the context is too short for this task", got=f"{n_tokens} tokens", expected=f"at most {room}")
    low, high = 1, 2
    while len(encode(fill(high))) <= room:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if len(encode(fill(middle))) <= room:
            low = middle
        else:
            high = middle
    return fill(low)
