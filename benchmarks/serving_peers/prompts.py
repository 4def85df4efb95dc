"""Prompts of a load: prose, alone or with a fact in it that is asked for. No two of them begin alike."""

import random
from dataclasses import dataclass

from tokenizers import Tokenizer

from benchmarks.quality.weights_texts import PROSE

OWNERS = ("baker", "doctor", "captain", "mayor", "engineer", "teacher", "gardener", "painter", "miller", "sailor")
THINGS = ("locker", "cabin", "garage", "office", "boat", "house")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Token ids, and the text that a right answer begins with; None if nothing is asked."""

    token_ids: list[int]
    answer: str | None = None


def prose(tokenizer: Tokenizer, n: int, *, n_tokens: int, seed: int) -> list[Prompt]:
    """``n`` prompts of ``n_tokens`` tokens: sentences in an order that is different in each, cut off at the end."""
    draws = [random.Random(f"prose {seed} {at}") for at in range(n)]
    return [Prompt(token_ids=_encoded(tokenizer, " ".join(sentences(draw, n_tokens)))[:n_tokens]) for draw in draws]


def facts_in_prose(tokenizer: Tokenizer, n: int, *, n_tokens: int, seed: int) -> list[Prompt]:
    """``n`` prompts of at most ``n_tokens`` tokens: a fact somewhere in prose, and at the end a question about it."""
    return [_asking(tokenizer, n_tokens, random.Random(f"facts {seed} {at}")) for at in range(n)]


def _asking(tokenizer: Tokenizer, n_tokens: int, draw: random.Random) -> Prompt:
    what, code = f"the code of the {draw.choice(OWNERS)}'s {draw.choice(THINGS)}", str(draw.randrange(1000, 10000))
    statement = f"{what[0].upper()}{what[1:]} is"
    fact, question = f"{statement} {code}.", f"\n\nQuestion: What is {what}?\nAnswer: {statement}"
    room = n_tokens - len(_encoded(tokenizer, f" {fact}{question}"))
    body: list[str] = []
    for sentence in sentences(draw, n_tokens):
        room -= len(_encoded(tokenizer, f" {sentence}"))
        if room < 0:
            break
        body.append(sentence)
    body.insert(draw.randint(0, len(body)), fact)
    return Prompt(token_ids=_encoded(tokenizer, " ".join(body) + question), answer=code)


def sentences(draw: random.Random, least: int) -> list[str]:
    """Sentences of at least so many words."""
    known = [f"{sentence.strip().strip('.')}." for sentence in PROSE.replace("\n", " ").split(". ")]
    found: list[str] = []
    while sum(len(sentence.split()) for sentence in found) < least:
        found += draw.sample(known, len(known))
    return found


def _encoded(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
