"""The synthetic English that the bundled checkpoint was trained on: documents of filler sentences with facts, then a question.

Facts: ``code of alice is 4 8 2 .``, ``bob holds a red key .``, ``carol lives in the old harbor .``. A question restates
the fact as its answer: ``question : what does bob hold ? answer : bob holds a red key .`` Words are separated by single
spaces; every word and every full stop is one token.
"""

import random
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from trt_kv.errors import UsageError

Split = Literal["calibration", "evaluation"]
SPLITS: tuple[Split, ...] = ("calibration", "evaluation")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    alice bob carol david erin frank grace henry iris jack karen leo mona nick olga paul quinn rosa sam tina uma victor
    wendy xavier yara zane amber boris celia derek elena felix gina hugo irene jonas kira lars mila noah opal petra ralph
    sonia tobias ursula viola walter ximena yusuf zelda arthur bella cyrus dora edgar flora gavin hazel ivan jenny kevin
    lena marco nora oscar pearl rufus sylvia trent vera willow
    """
)
COLORS = _words("red blue green yellow black white purple orange silver golden crimson violet teal amberish ivory scarlet")
OBJECTS = _words("key lamp ring coin book sword crown map stone mirror bottle flute drum shield rope candle")
PLACES = _words(
    "harbor castle forest desert village temple market bridge tower valley island library garden stable mill station"
)
VERBS = _words("walked ran sailed rode drifted wandered hurried marched")
ADJECTIVES = _words("quiet old bright cold narrow dusty gentle ancient busy lonely windy warm")
NOUNS = _words("river road wind cloud bird horse dog cat ship wagon crowd song storm shadow bell tree")
PREPOSITIONS = _words("near under over across beside toward")
ADVERBS = _words("very often never soon again")
DIGITS = _words("0 1 2 3 4 5 6 7 8 9")
SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<unk>")

_OTHER_WORDS = _words(
    """
    the a and then while before after was is were slowly . ? : , what where who which does hold holds live lives in of code
    place object for question answer var equals note remember friend friends with says copy list
    """
)
WORD_LISTS = (NAMES, COLORS, OBJECTS, PLACES, VERBS, ADJECTIVES, NOUNS, PREPOSITIONS, ADVERBS, DIGITS, _OTHER_WORDS)
VOCABULARY = (*SPECIAL_TOKENS, *sorted({word for words in WORD_LISTS for word in words}))

LONGEST_FILLER = 11
LONGEST_FACT = 8
LONGEST_QUESTION = 11


FactKind = Literal["code", "object", "home"]
FACT_KINDS: tuple[FactKind, ...] = ("code", "object", "home")
FACT_VALUES: dict[FactKind, tuple[tuple[str, ...], ...]] = {
    "code": (DIGITS, DIGITS, DIGITS),
    "object": (COLORS, OBJECTS),
    "home": (ADJECTIVES, PLACES),
}
"""What the words of a fact are drawn from, by kind."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact about ``name``: ``values`` are one word of each list of ``FACT_VALUES[kind]``."""

    name: str
    kind: FactKind
    values: tuple[str, ...]

    @property
    def sentence(self) -> tuple[str, ...]:
        """The sentence that states the fact in a document and in an answer."""
        told: dict[FactKind, tuple[str, ...]] = {
            "code": ("code", "of", self.name, "is"),
            "object": (self.name, "holds", "a"),
            "home": (self.name, "lives", "in", "the"),
        }
        return (*told[self.kind], *self.values, ".")

    @property
    def question(self) -> tuple[str, ...]:
        """The question whose answer is the fact."""
        asked: dict[FactKind, tuple[str, ...]] = {
            "code": ("what", "is", "the", "code", "of", self.name),
            "object": ("what", "does", self.name, "hold"),
            "home": ("where", "does", self.name, "live"),
        }
        return ("question", ":", *asked[self.kind], "?", "answer", ":")

    @property
    def split(self) -> Split:
        """The split this fact belongs to."""
        return split_of(self.sentence)


def split_of(sentence: Iterable[str]) -> Split:
    """The split of the fact that ``sentence`` states, a function of its words alone: no fact can be in both splits."""
    return SPLITS[zlib.crc32(" ".join(sentence).encode()) % 2]


def filler_sentence(rng: random.Random) -> list[str]:
    """One sentence of 8 to 11 words without a fact."""
    kind = rng.random()
    if kind < 0.4:
        where = ["the", rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.choice(VERBS), rng.choice(PREPOSITIONS)]
        return [*where, "the", rng.choice(ADJECTIVES), rng.choice(PLACES), "."]
    if kind < 0.7:
        how = ["a", rng.choice(NOUNS), "was", rng.choice(ADVERBS), rng.choice(ADJECTIVES)]
        return [*how, "and", "the", rng.choice(NOUNS), rng.choice(VERBS), "slowly", "."]
    return ["then", "the", rng.choice(NOUNS), rng.choice(VERBS), "before", "the", rng.choice(NOUNS), "."]


def filler_sentences(rng: random.Random, n_words: int) -> list[list[str]]:
    """Filler sentences of at most ``n_words`` words in all, less by fewer than the words of one long sentence."""
    sentences = []
    while n_words > LONGEST_FILLER:
        sentence = filler_sentence(rng)
        sentences.append(sentence)
        n_words -= len(sentence)
    return sentences


def draw_facts(rng: random.Random, count: int, split: Split) -> list[Fact]:
    """``count`` facts of one split about different names; ``UsageError`` if there are not enough names."""
    if not 1 <= count <= len(NAMES):
        raise UsageError("too many facts for a document", got=count, expected=f"1 to {len(NAMES)}, one per name")
    return [draw_fact(rng, name, rng.choice(FACT_KINDS), split) for name in rng.sample(NAMES, count)]


def draw_fact(rng: random.Random, name: str, kind: FactKind, split: Split) -> Fact:
    """A fact of ``kind`` about ``name``, drawn again until it belongs to ``split``."""
    while True:
        fact = Fact(name=name, kind=kind, values=tuple(rng.choice(words) for words in FACT_VALUES[kind]))
        if fact.split == split:
            return fact


def draw_similar_facts(rng: random.Random, fact: Fact, count: int) -> list[Fact]:
    """``count`` facts of the same split that are easily confused with ``fact``.

    First those of the other kinds about the same name; then facts of the same kind about other names, all of whose words except
    one are those of ``fact``. ``UsageError`` if there are not enough names.
    """
    if not 0 <= count <= len(NAMES) + len(FACT_KINDS) - 2:
        expected = f"0 to {len(NAMES) + len(FACT_KINDS) - 2}"
        raise UsageError("too many similar facts for a document", got=count, expected=expected)
    same_name = [draw_fact(rng, fact.name, kind, fact.split) for kind in FACT_KINDS if kind != fact.kind][:count]
    names = rng.sample([name for name in NAMES if name != fact.name], count - len(same_name))
    return same_name + [_same_but_one_word(rng, fact, name) for name in names]


def _same_but_one_word(rng: random.Random, fact: Fact, name: str) -> Fact:
    """A fact about ``name`` that differs from ``fact`` in one value, drawn again until it belongs to its split."""
    while True:
        values = list(fact.values)
        place = rng.randrange(len(values))
        values[place] = rng.choice([word for word in FACT_VALUES[fact.kind][place] if word != values[place]])
        similar = Fact(name=name, kind=fact.kind, values=tuple(values))
        if similar.split == fact.split:
            return similar


def place_sentence(sentences: list[list[str]], sentence: Iterable[str], distance: int) -> tuple[list[list[str]], int]:
    """Insert ``sentence`` at the place where the number of words after it is closest to ``distance``: (sentences, words after
    it).
    """
    words_after = [0]
    for other in reversed(sentences):
        words_after.append(words_after[-1] + len(other))
    place = min(range(len(words_after)), key=lambda index: abs(words_after[index] - distance))
    cut = len(sentences) - place
    return [*sentences[:cut], list(sentence), *sentences[cut:]], words_after[place]
