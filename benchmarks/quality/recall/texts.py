"""Texts whose ends need tokens from all over them: prose in which facts are hidden, and records of which many are asked for.

Invented from word lists and Python's own help, so that nothing is downloaded. A text ends with the right answer, which is fed
and not generated: what the model attends to there is what it has to find.
"""

import importlib
import random
from dataclasses import dataclass

from tokenizers import Tokenizer

FIRST = (
    "Ada Boris Clara Dmitri Elena Farid Greta Hugo Irene Jonas Karla Leon Mira Nils Olga Pavel Quinn Rosa Stefan Tara".split()
)
LAST = (
    "Abbot Becker Castle Draper Ekman Fowler Grieve Hansen Ingram Jensen Keller Larsen Mercer Norman Osborne Parker Quigley "
    "Rivers Sutter Turner Ullman Vinter Walker Young"
).split()
CITIES = "Lund Graz Porto Bergen Turin Ghent Basel Cork Leiden Riga Tartu Malaga".split()
DISHES = "soup bread pie stew salad rice pasta cake".split()


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt and its right answer, as token ids; ``values`` are the indices into ``answer_ids`` of the tokens to find."""

    prompt_ids: list[int]
    answer_ids: list[int]
    values: tuple[int, ...]


def facts_in_help(tokenizer: Tokenizer, *, n_tokens: int, n_facts: int, seed: int) -> Asked:
    """At most ``n_tokens`` of Python's help, ``n_facts`` codes of four digits between its paragraphs; all are asked for."""
    draw = random.Random(f"help {seed}")
    codes = {name: str(draw.randrange(1000, 10000)) for name in _names(draw, n_facts)}
    facts = [f"Note: the code of {name} is {code}." for name, code in codes.items()]
    wanted = list(codes.items())
    draw.shuffle(wanted)
    question = "\n\nQuestion: What are the codes of " + ", ".join(name for name, _ in wanted) + "?\nAnswer:"
    answer = [(f" The code of {name} is", f" {code}", ".") for name, code in wanted]
    topics = importlib.import_module("pydoc_data.topics").topics
    chapters = [topics[name] for name in draw.sample(sorted(topics), len(topics))]
    paragraphs = [part for chapter in chapters for part in chapter.split("\n\n")]
    return _fitted(tokenizer, paragraphs, facts, question, answer, n_tokens, draw, between="\n\n")


def records(tokenizer: Tokenizer, *, n_tokens: int, n_asked: int, seed: int) -> Asked:
    """At most ``n_tokens`` of records, one a line, then a request for fields of ``n_asked`` of them in another order."""
    draw = random.Random(f"records {seed}")
    names = _names(draw, min(len(FIRST) * len(LAST), n_tokens // 18 + n_asked))
    lines = {name: (str(draw.randrange(1000, 10000)), draw.choice(CITIES), draw.choice(DISHES)) for name in names}
    asked = draw.sample(names, n_asked)
    written = {name: f"Name: {name}, code {code}, city {city}, dish {dish}." for name, (code, city, dish) in lines.items()}
    request = "\n\nRepeat the records of these people: " + "; ".join(asked) + "\n"
    answer = []
    for name in asked:
        code, city, dish = lines[name]
        answer += [(f"Name: {name}, code", f" {code}", ", city"), ("", f" {city}", f", dish {dish}.\n")]
    others = [written[name] for name in names if name not in asked]
    return _fitted(tokenizer, others, [written[name] for name in asked], request, answer, n_tokens, draw, between="\n")


def _names(draw: random.Random, n: int) -> list[str]:
    """``n`` different names, each of two words."""
    return draw.sample([f"{first} {last}" for first in FIRST for last in LAST], n)


def _fitted(
    tokenizer: Tokenizer,
    others: list[str],
    wanted: list[str],
    question: str,
    answer: list[tuple[str, str, str]],
    n_tokens: int,
    draw: random.Random,
    *,
    between: str,
) -> Asked:
    """As many of ``others`` as fit, ``wanted`` among them in random places; ``answer``: parts before, in and after a value."""

    def ids(text: str) -> list[int]:
        found: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        return found

    answer_ids: list[int] = []
    values: list[int] = []
    for before, value, after in answer:
        answer_ids += ids(before)
        found = ids(value)
        values += range(len(answer_ids), len(answer_ids) + len(found))
        answer_ids += found + ids(after)
    room = n_tokens - len(answer_ids) - len(ids(question)) - sum(len(ids(between + text)) for text in wanted)
    body: list[str] = []
    for text in others:
        room -= len(ids(between + text))
        if room < 0:
            break
        body.append(text)
    for text in wanted:
        body.insert(draw.randint(0, len(body)), text)
    return Asked(prompt_ids=ids(between.join(body) + question), answer_ids=answer_ids, values=tuple(values))
