"""The families of tasks of the report, and how one is drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

from benchmarks.quality.real import records, ruler
from benchmarks.quality.real.items import Encode, Item
from trt_kv.calibration.tasks import evaluation_tasks

Mode = Literal["aware", "primed", "agnostic"]
MODES: tuple[Mode, ...] = ("aware", "agnostic")
"""What is read before tokens are evicted: "aware" the context and the question, "agnostic" the context alone, as kvpress's
leaderboard has them. "primed": the first words of the answer too, which it feeds afterwards in both.
"""
PRIMED: tuple[Mode, ...] = ("aware", "primed", "agnostic")


Draw = Callable[[Random, Encode, int, int], tuple[Item, ...]]


@dataclass(frozen=True, kw_only=True)
class FamilyFacts:
    """A family as the results tell it."""

    name: str
    title: str
    description: str
    modes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of tasks; ``draw`` makes the items of one document. Policies are compared on one of ``every`` documents, if all
    of them would take too long.
    """

    facts: FamilyFacts
    draw: Draw
    every: int = 1

    @property
    def name(self) -> str:
        return self.facts.name

    def items(self, encode: Encode, n_tokens: int, document: int) -> tuple[Item, ...]:
        """The items of a document of at most ``n_tokens`` tokens, answers included; always the same for the same arguments."""
        return self.draw(Random(f"{self.name} {n_tokens} {document}"), encode, n_tokens, document)


def families() -> list[Family]:
    """All of them, in the order in which they are shown."""
    return [
        _ruler("niah_single_1", "One needle in filler", "a number, in five sentences that repeat", ruler.single("filler")),
        _ruler("niah_single_2", "One needle in prose", "a number, in prose", ruler.single("prose"), PRIMED),
        _ruler("niah_single_3", "One UUID in prose", "a UUID, in prose", ruler.single("prose", "uuids")),
        _ruler("niah_multikey_1", "One of four needles", "four keys in prose, one is asked for", ruler.multikey_prose),
        _ruler(
            "niah_multikey_2", "Needles only", "every sentence is a needle, one is asked for", ruler.only_needles("numbers")
        ),
        _ruler("niah_multikey_3", "UUIDs only", "every sentence is a UUID of a UUID", ruler.only_needles("uuids")),
        _ruler("niah_multivalue", "Four values", "four numbers of one key in prose, all wanted", ruler.multivalue),
        _ruler("niah_multiquery", "Four keys asked", "the numbers of four keys in prose, all wanted", ruler.multiquery),
        _ruler("vt", "Variable tracking", "a chain of five variables in filler, all names wanted", ruler.variables),
        _ruler("cwe", "Common words", "the ten words that a list has most often", ruler.common_words),
        _ruler("fwe", "Frequent words", "the three most frequent made-up words", ruler.frequent_words),
        _of("facts", "Many facts", "22 facts of four digits in prose, one is asked for", records.one_of_many_facts, PRIMED),
        _of("records", "Records as JSON", "invented people in prose, all wanted as a list of objects", records.extraction),
        _of("instructions", "Two instructions", "two rules, then prose, then a case of each", records.two_instructions),
        _of(
            "generated",
            "Fact in what was generated",
            "a fact early in a long text that counts as generated, asked for at its end",
            records.fact_in_generated,
            modes=("agnostic",),
            every=5,
        ),
    ]


def synthetic_families() -> list[Family]:
    """What the bundled model can do, which knows no other language: facts of trt-kv's synthetic English."""
    return [
        _of("synthetic", "Facts", "a question about one of four facts, in synthetic English", _synthetic),
        _of("synthetic_many", "Many facts", "a question about one of twelve facts, in synthetic English", _synthetic_many),
        _ruler("niah_single_2", "One needle in prose", "a number, in prose", ruler.single("prose")),
    ]


def _synthetic(draw: Random, _: Encode, n_tokens: int, document: int, n_facts: int = 4) -> tuple[Item, ...]:
    (task,) = evaluation_tasks(1, context_length=n_tokens, n_facts=n_facts, seed=draw.randrange(10**6))
    words = task.prompt.split()
    context, question = words[: -task.n_question_words], words[-task.n_question_words :]
    item = Item(
        document=document,
        context=" ".join(context),
        question=" " + " ".join(question),
        prefix="",
        references=(task.answer,),
        n_new=task.n_answer_tokens,
    )
    return (item,)


def _synthetic_many(draw: Random, encode: Encode, n_tokens: int, document: int) -> tuple[Item, ...]:
    return _synthetic(draw, encode, n_tokens, document, n_facts=12)


def _ruler(name: str, title: str, description: str, draw: ruler.Draw, modes: tuple[Mode, ...] = MODES) -> Family:
    return _of(name, title, f"RULER's {name}: {description}", lambda *given: (draw(*given),), modes)


def _of(
    name: str,
    title: str,
    description: str,
    draw: Draw,
    modes: tuple[Mode, ...] = MODES,
    every: int = 1,
) -> Family:
    return Family(facts=FamilyFacts(name=name, title=title, description=description, modes=modes), draw=draw, every=every)
