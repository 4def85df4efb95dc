"""RULER's synthetic tasks (arXiv 2404.06654), made again from their description: needles, chains of variables, frequent words.

What differs: the haystack of essays is prose of Python's documentation, keys are drawn from our own words, and questions are
worded, with the first words of the answer, such that a model of 135 M parameters answers them with its whole cache.
"""

from collections.abc import Callable
from random import Random

from benchmarks.quality.real.haystack import FILLER, inserted, prose_from
from benchmarks.quality.real.items import Encode, Item, fitted
from benchmarks.quality.real.words import ADJECTIVES, NOUNS, identifiers, keys, made_up, numbers

N_DEPTHS = 40
"""Needles are placed at depths drawn from so many equally spaced ones."""
N_WORD, N_UUID = 12, 40
"""New tokens for a number of 7 digits, and for a UUID."""
MARGIN = 8
"""Tokens that a chat template, and joining texts, may add to the texts' own."""

Draw = Callable[[Random, Encode, int, int], Item]
"""Makes an item of at most so many tokens, answer included, for a document with a number."""


def needle(key: str, value: str, kind: str = "numbers") -> str:
    """RULER's sentence about a key."""
    return f"One of the special magic {kind} for {key} is: {value}."


def depths(draw: Random, n: int) -> list[float]:
    """Depths of ``n`` needles, between 0 and 1."""
    return [draw.randrange(N_DEPTHS) / (N_DEPTHS - 1) for _ in range(n)]


def single(haystack: str, kind: str = "numbers") -> Draw:
    """One needle, in "filler" or "prose", with a number or one of the "uuids"."""
    return _needles(haystack, n_keys=1, n_values=1, n_asked=1, kind=kind)


def _needles(haystack: str, *, n_keys: int, n_values: int, n_asked: int, kind: str = "numbers") -> Draw:
    def make(draw: Random, encode: Encode, n_tokens: int, document: int) -> Item:
        names = keys(draw, n_keys)
        drawn = (identifiers if kind == "uuids" else numbers)(draw, n_keys * n_values)
        values = {name: drawn[at * n_values : (at + 1) * n_values] for at, name in enumerate(names)}
        facts = [needle(name, value, kind) for name in names for value in values[name]]
        draw.shuffle(facts)
        asked = draw.sample(names, n_asked)
        references = tuple(value for name in asked for value in values[name])
        question, prefix = _question(asked, kind, several=len(references) > 1)
        n_new = (N_UUID if kind == "uuids" else N_WORD) * len(references)
        at = depths(draw, len(facts))
        state = draw.getstate()

        def fill(n: int) -> str:
            draw.setstate(state)
            sentences = prose_from(draw, n) if haystack == "prose" else [FILLER[at % len(FILLER)] for at in range(n)]
            return f"{INTRODUCTION}\n{' '.join(inserted(sentences, facts, at))}"

        context = fitted(fill, encode, n_tokens - n_new - MARGIN - len(encode(question + prefix)))
        return Item(
            document=document,
            context=context,
            question=question,
            prefix=prefix,
            references=references,
            n_new=n_new,
            stop="" if len(references) > 1 else "\n",
        )

    return make


INTRODUCTION = "Some special magic values are hidden within the following text. Make sure to memorize them."


def _question(asked: list[str], kind: str, *, several: bool) -> tuple[str, str]:
    """The question, and the first words of the answer."""
    names = asked[0] if len(asked) == 1 else f"{', '.join(asked[:-1])}, and {asked[-1]}"
    one = kind.removesuffix("s")
    if not several:
        return (
            f"\n\nQuestion: What is the special magic {one} for {names} mentioned in the text?",
            f"\nAnswer: One of the special magic {kind} for {names} is:",
        )
    return (
        f"\n\nQuestion: What are all the special magic {kind} for {names} mentioned in the text?",
        f"\nAnswer: The special magic {kind} for {names} mentioned in the text are:\n1.",
    )


def multikey_prose(draw: Random, encode: Encode, n_tokens: int, document: int) -> Item:
    """niah_multikey_1: four needles in prose, one is asked for."""
    return _needles("prose", n_keys=4, n_values=1, n_asked=1)(draw, encode, n_tokens, document)


def multivalue(draw: Random, encode: Encode, n_tokens: int, document: int) -> Item:
    """niah_multivalue: four values of one key, all of them wanted."""
    return _needles("prose", n_keys=1, n_values=4, n_asked=1)(draw, encode, n_tokens, document)


def multiquery(draw: Random, encode: Encode, n_tokens: int, document: int) -> Item:
    """niah_multiquery: four keys, the values of all of them wanted."""
    return _needles("prose", n_keys=4, n_values=1, n_asked=4)(draw, encode, n_tokens, document)


def only_needles(kind: str) -> Draw:
    """niah_multikey_2 and 3: every sentence is a needle; numbers by word, or UUIDs by UUID."""

    def make(draw: Random, encode: Encode, n_tokens: int, document: int) -> Item:
        most = n_tokens // 16
        names = identifiers(draw, most) if kind == "uuids" else keys(draw, most)
        values = (identifiers if kind == "uuids" else numbers)(draw, most)
        place = draw.random()
        n_new = N_UUID if kind == "uuids" else N_WORD
        longest = max(len(encode("".join(_question([name], kind, several=False)))) for name in names[:8]) + MARGIN

        def fill(n: int) -> str:
            facts = [needle(name, value, kind) for name, value in zip(names[:n], values[:n], strict=True)]
            return "\n".join([INTRODUCTION, *facts])

        context = fitted(fill, encode, n_tokens - n_new - MARGIN - longest)
        asked = int(place * (len(context.split("\n")) - 1))
        question, prefix = _question([names[asked]], kind, several=False)
        references = (values[asked],)
        return Item(document=document, context=context, question=question, prefix=prefix, references=references, n_new=n_new)

    return make


def variables(draw: Random, encode: Encode, n_tokens: int, document: int) -> Item:
    """vt: a chain of five variables in filler; wanted are the names of all that have its number. One worked example first."""
    names = ["".join(draw.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 5)) for _ in range(5)]
    example = ["".join(draw.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 3)) for _ in range(5)]
    value, other = numbers(draw, 2, 5)
    at = sorted(depths(draw, 5))
    n_new = 30
    shown = f"{' '.join(_chain(example, other))}{''.join(_asked_for(other))} {', '.join(example)}"
    question, prefix = _asked_for(value)

    def fill(n: int) -> str:
        sentences = [FILLER[i % len(FILLER)] for i in range(n)]
        return f"{shown}\n\n{' '.join(_in_order(sentences, _chain(names, value), at))}"

    context = fitted(fill, encode, n_tokens - n_new - MARGIN - len(encode(question + prefix)))
    references = tuple(names)
    return Item(document=document, context=context, question=question, prefix=prefix, references=references, n_new=n_new)


def _chain(names: list[str], value: str) -> list[str]:
    return [f"VAR {name} = {of}." for name, of in zip(names, [value, *[f"VAR {name}" for name in names]], strict=False)]


def _asked_for(value: str) -> tuple[str, str]:
    return (
        f"\nQuestion: Find all variables that are assigned the value {value} in the text above.",
        f"\nAnswer: The variables that are assigned the value {value}, five in all, are:",
    )


def _in_order(sentences: list[str], facts: list[str], at: list[float]) -> list[str]:
    body = list(sentences)
    for depth, fact in reversed(list(zip(at, facts, strict=True))):
        body.insert(round(depth * len(sentences)), fact)
    return body


def common_words(draw: Random, encode: Encode, n_tokens: int, document: int) -> Item:
    """cwe below 4096 tokens: a numbered list in which ten words stand six times each, and others once."""
    words = draw.sample([*ADJECTIVES, *NOUNS], len(ADJECTIVES) + len(NOUNS))
    common, rare = words[:10], words[10:]
    n_new = 60
    question = "\nQuestion: What are the 10 most common words in the above list?"
    prefix = "\nAnswer: The top 10 words that appear most often in the list are:"
    seed = draw.random()

    def fill(n: int) -> str:
        listed = [*common * (6 if n_tokens < 4096 else 30), *(rare * (1 + n // len(rare)))[:n]]
        Random(seed).shuffle(listed)
        numbered = " ".join(f"{at + 1}. {word}" for at, word in enumerate(listed))
        return f"Below is a numbered list of words. Memorize the ones that appear most often.\n{numbered}"

    context = fitted(fill, encode, n_tokens - n_new - MARGIN - len(encode(question + prefix)))
    return Item(
        document=document,
        context=context,
        question=question,
        prefix=prefix,
        references=tuple(common),
        n_new=n_new,
        stop="",
    )


def frequent_words(draw: Random, encode: Encode, n_tokens: int, document: int) -> Item:
    """fwe: made-up words, as often as Zipf's law with exponent 2 says; wanted are ranks 2 to 4, as rank 1 is noise."""
    words = made_up(draw, max(8, (n_tokens - 50) // 50), 6)
    n_new = 30
    question = "\nQuestion: What are the three most frequent words in the above coded text, apart from the dots?"
    prefix = "\nAnswer: The three most frequent words are:"
    seed = draw.random()

    def fill(n: int) -> str:
        total = sum(1.0 / rank**2 for rank in range(1, 1000))
        listed = [word for rank, word in enumerate(["...", *words], 1) for _ in range(int(16 * n / rank**2 / total))]
        Random(seed).shuffle(listed)
        return f"Read the following coded text and count how often each coded word appears.\n{' '.join(listed)}"

    context = fitted(fill, encode, n_tokens - n_new - MARGIN - len(encode(question + prefix)))
    return Item(
        document=document,
        context=context,
        question=question,
        prefix=prefix,
        references=tuple(words[:3]),
        n_new=n_new,
        stop="",
    )
