"""The synthetic English that the bundled checkpoint speaks: documents of filler sentences with facts, then a question.

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


@dataclass(frozen=True, kw_only=True)
class Fact:
    """One fact about ``name``: the words of its sentence and of the question that it answers."""

    name: str
    sentence: tuple[str, ...]
    question: tuple[str, ...]

    @property
    def split(self) -> Split:
        """The split this fact belongs to, decided by its words alone: no fact can be told in both splits."""
        return SPLITS[zlib.crc32(" ".join(self.sentence).encode()) % 2]


def filler_sentence(rng: random.Random) -> list[str]:
    """One sentence of 8 to 11 words that tells nothing."""
    kind = rng.random()
    if kind < 0.4:
        where = ["the", rng.choice(ADJECTIVES), rng.choice(NOUNS), rng.choice(VERBS), rng.choice(PREPOSITIONS)]
        return [*where, "the", rng.choice(ADJECTIVES), rng.choice(PLACES), "."]
    if kind < 0.7:
        how = ["a", rng.choice(NOUNS), "was", rng.choice(ADVERBS), rng.choice(ADJECTIVES)]
        return [*how, "and", "the", rng.choice(NOUNS), rng.choice(VERBS), "slowly", "."]
    return ["then", "the", rng.choice(NOUNS), rng.choice(VERBS), "before", "the", rng.choice(NOUNS), "."]


def filler_sentences(rng: random.Random, n_words: int) -> list[list[str]]:
    """Filler sentences of at most ``n_words`` words in all, and less than one long sentence below that."""
    sentences = []
    while n_words > LONGEST_FILLER:
        sentence = filler_sentence(rng)
        sentences.append(sentence)
        n_words -= len(sentence)
    return sentences


def draw_facts(rng: random.Random, count: int, split: Split) -> list[Fact]:
    """``count`` facts of one split about different names; ``UsageError`` when there are not so many names."""
    if not 1 <= count <= len(NAMES):
        raise UsageError("a document cannot tell so many facts", got=count, expected=f"1 to {len(NAMES)}, one per name")
    return [_draw_fact(rng, name, split) for name in rng.sample(NAMES, count)]


def _draw_fact(rng: random.Random, name: str, split: Split) -> Fact:
    """A fact about ``name``, drawn again until it belongs to ``split``."""
    kind = rng.randrange(3)
    while True:
        if kind == 0:
            told = ["code", "of", name, "is", *(rng.choice(DIGITS) for _ in range(3))]
            asked = ["what", "is", "the", "code", "of", name]
        elif kind == 1:
            told = [name, "holds", "a", rng.choice(COLORS), rng.choice(OBJECTS)]
            asked = ["what", "does", name, "hold"]
        else:
            told = [name, "lives", "in", "the", rng.choice(ADJECTIVES), rng.choice(PLACES)]
            asked = ["where", "does", name, "live"]
        fact = Fact(name=name, sentence=(*told, "."), question=("question", ":", *asked, "?", "answer", ":"))
        if fact.split == split:
            return fact


def place_sentence(sentences: list[list[str]], sentence: Iterable[str], distance: int) -> tuple[list[list[str]], int]:
    """Insert ``sentence`` where the number of words after it comes closest to ``distance``: (sentences, words after it)."""
    words_after = [0]
    for other in reversed(sentences):
        words_after.append(words_after[-1] + len(other))
    place = min(range(len(words_after)), key=lambda index: abs(words_after[index] - distance))
    cut = len(sentences) - place
    return [*sentences[:cut], list(sentence), *sentences[cut:]], words_after[place]
