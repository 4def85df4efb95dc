"""Tasks besides RULER's: facts among facts, extraction of all records, two instructions at once, a fact in generated text."""

import json
from random import Random

from benchmarks.quality.real.haystack import inserted, prose_from
from benchmarks.quality.real.items import Encode, Item, fitted
from benchmarks.quality.real.ruler import MARGIN
from benchmarks.quality.real.words import ADJECTIVES, NOUNS

CITIES = tuple(
    "Paris London Berlin Madrid Rome Vienna Prague Dublin Athens Lisbon Moscow Cairo Tokyo Delhi Boston Chicago Dallas Seattle "
    "Toronto Sydney Oslo Warsaw Nairobi Lima Geneva Milan Dresden Porto Bergen Cork".split()
)
FIRST = tuple(
    "Anna Boris Clara David Elena Felix Greta Hugo Irene Jonas Karla Leo Maria Nils Olga Paul Rosa Simon Tina Viktor".split()
)
LAST = tuple("Adler Brandt Costa Duval Ekman Fischer Garcia Holm Ivanov Jensen Keller Lund Moreau Novak Olsen Peters".split())
JOBS = tuple("baker doctor captain engineer teacher gardener painter miller sailor lawyer farmer nurse pilot tailor".split())
N_FACTS = 22
N_NEW = 6
"""New tokens for a number of four digits."""
N_RECORDS = 4


def city_facts(draw: Random, n: int) -> list[tuple[str, str]]:
    """``n`` cities and their numbers of four digits."""
    return list(zip(draw.sample(CITIES, n), map(str, draw.sample(range(1000, 10000), n)), strict=True))


def fact_text(city: str, number: str) -> str:
    """The sentence that tells one."""
    return f"The magic number of {city} is {number}."


def fact_question(city: str) -> tuple[str, str]:
    """The question about it, and the answer up to the number."""
    return f"\n\nQuestion: What is the magic number of {city}?", f"\nAnswer: The magic number of {city} is"


def prose_with(draw: Random, facts: list[str], encode: Encode, room: int) -> str:
    """``facts`` at random places of as much prose as fits."""
    depths = [draw.random() for _ in facts]
    state = draw.getstate()

    def fill(n: int) -> str:
        draw.setstate(state)
        return " ".join(inserted(prose_from(draw, n), facts, depths))

    return fitted(fill, encode, room)


def one_of_many_facts(draw: Random, encode: Encode, n_tokens: int, document: int) -> tuple[Item, ...]:
    """Facts that resemble each other, one of which is asked for."""
    facts = city_facts(draw, N_FACTS)
    city, number = draw.choice(facts)
    question, prefix = fact_question(city)
    room = n_tokens - 2 * MARGIN - len(encode(question + prefix))
    context = prose_with(draw, [fact_text(*fact) for fact in facts], encode, room)
    item = Item(document=document, context=context, question=question, prefix=prefix, references=(number,), n_new=N_NEW)
    return (item,)


def extraction(draw: Random, encode: Encode, n_tokens: int, document: int) -> tuple[Item, ...]:
    """As Text2JSON: invented people in prose, all of them wanted (``marking.records_found``)."""
    names = [f"{first} {last}" for first, last in zip(draw.sample(FIRST, N_RECORDS), draw.sample(LAST, N_RECORDS), strict=True)]
    people = [{"name": name, "job": draw.choice(JOBS), "city": draw.choice(CITIES)} for name in names]
    begun = '[{"name": "'
    question = "\n\nAll people who are mentioned in the text above, in order, each with name, job and city, as JSON:"
    prefix = f"\n{begun}"
    n_new = len(encode(json.dumps(people))) + 40
    depths = sorted(draw.random() for _ in people)
    state = draw.getstate()

    def fill(n: int) -> str:
        draw.setstate(state)
        return " ".join(inserted(prose_from(draw, n), [_told(person) for person in people], depths))

    context = fitted(fill, encode, n_tokens - n_new - MARGIN - len(encode(question + prefix)))
    references = tuple(json.dumps(person) for person in people)
    item = Item(
        document=document,
        context=context,
        question=question,
        prefix=prefix,
        references=references,
        n_new=n_new,
        begun=begun,
        stop="]",
        marking="records",
    )
    return (item,)


def _told(person: dict[str, str]) -> str:
    return f"{person['name']} works as a {person['job']} in {person['city']}."


def two_instructions(draw: Random, encode: Encode, n_tokens: int, document: int) -> tuple[Item, ...]:
    """Two rules in one prompt (as in arXiv 2510.00231, which shows that eviction forgets one of them), and a case of each."""
    things, replies = draw.sample(NOUNS, 2), draw.sample(ADJECTIVES, 2)
    rules = " ".join(f"{_rule(thing)} {reply}." for thing, reply in zip(things, replies, strict=True))
    state = draw.getstate()

    def fill(n: int) -> str:
        draw.setstate(state)
        return f"{rules}\n\n{' '.join(prose_from(draw, n))}"

    question = "\n\nRemember the rules. You are asked about the {thing}."
    longest = max(len(encode(f"{question} {_rule(thing)}")) for thing in things)
    context = fitted(fill, encode, n_tokens - 2 * MARGIN - longest)
    return tuple(
        Item(
            document=document,
            context=context,
            question=question.format(thing=thing),
            prefix=f"\n{_rule(thing)}",
            references=(reply,),
            n_new=4,
        )
        for thing, reply in zip(things, replies, strict=True)
    )


def _rule(thing: str) -> str:
    return f"When you are asked about the {thing}, say"


def fact_in_generated(draw: Random, encode: Encode, n_tokens: int, document: int) -> tuple[Item, ...]:
    """A quarter of the tokens is the prompt, the rest counts as generated, with a fact near its beginning."""
    ((city, number),) = city_facts(draw, 1)
    question, prefix = fact_question(city)
    context = prose_with(draw, [], encode, n_tokens // 4)
    room = n_tokens - len(encode(context)) - 2 * MARGIN - len(encode(question + prefix))
    depth = 0.05 + 0.2 * draw.random()
    state = draw.getstate()

    def fill(n: int) -> str:
        draw.setstate(state)
        return " " + " ".join(inserted(prose_from(draw, n), [fact_text(city, number)], [depth]))

    said = fitted(fill, encode, room)
    return (
        Item(
            document=document,
            context=context,
            said=said,
            question=question,
            prefix=prefix,
            references=(number,),
            n_new=N_NEW,
        ),
    )
