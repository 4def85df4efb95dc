"""Prompts to calibrate with and tasks to evaluate with, in the bundled model's synthetic English.

Prompts are words separated by single spaces, without ``<bos>``: the tokenizer adds it. Each fact belongs to one split, a
function of its words, so calibration and evaluation never share a document (``synthetic_english.Fact.split``).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trt_kv.calibration.synthetic_english import (
    LONGEST_FACT,
    LONGEST_FILLER,
    LONGEST_QUESTION,
    SPECIAL_TOKENS,
    VOCABULARY,
    Fact,
    Split,
    draw_facts,
    draw_similar_facts,
    filler_sentences,
    place_sentence,
)
from trt_kv.errors import UsageError

Region = Literal["near", "middle", "far"]
REGIONS: tuple[Region, ...] = ("near", "middle", "far")
FACT_COUNTS = (4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A prompt and its correct continuation.

    ``kind`` "fact": the answer restates one fact of the document and must match word for word. ``kind`` "copy": the same,
    with a sequence of random words. ``kind`` "text": the answer is a continuation of the text, for perplexity.

    ``n_facts``: facts in the document. ``fact_distance``: words between the end of the fact or passage asked for and the
    end of the document, None for ``text``. ``n_question_words``: length of the question at the end of the prompt, after the
    document. ``split``, ``seed`` and ``index`` reproduce the task.
    """

    kind: Literal["fact", "copy", "text"]
    prompt: str
    answer: str
    split: Split
    seed: int
    index: int
    n_facts: int
    fact_distance: int | None
    n_question_words: int

    @property
    def n_prompt_tokens(self) -> int:
        """Tokens of the prompt for the bundled tokenizer: its words and ``<bos>``."""
        return 1 + len(self.prompt.split())

    @property
    def n_answer_tokens(self) -> int:
        """Tokens of the answer for the bundled tokenizer."""
        return len(self.answer.split())


def calibration_prompts(
    count: int, *, context_length: int = 1024, n_facts: Sequence[int] | None = None, seed: int = 0
) -> list[Task]:
    """``count`` documents of the calibration split that end in a late question about any of their facts.

    ``context_length``: tokens at most, ``<bos>`` and the answer included. ``n_facts``: facts per document, used in turn;
    None uses those of 4, 8, 16, 32 that fit. ``UsageError`` for a count below 1 or a context too short for the facts.
    """
    counts = tuple(n_facts) if n_facts is not None else _fact_counts_that_fit(context_length)
    return _fact_tasks("calibration", count, context_length=context_length, n_facts=counts, distance=None, seed=seed)


def evaluation_tasks(
    count: int, *, context_length: int, n_facts: int, distance: int | Region | None = None, seed: int = 0
) -> list[Task]:
    """``count`` documents of the evaluation split, one question at the end of each.

    ``context_length``: maximum number of tokens, ``<bos>``, question and answer included; at most one filler sentence less.
    ``distance`` of the asked fact: words between it and the end of the document (met to within half a sentence), or its
    ``near``, ``middle`` or ``far`` third, or None for anywhere. ``UsageError`` for impossible values.
    """
    return _fact_tasks("evaluation", count, context_length=context_length, n_facts=(n_facts,), distance=distance, seed=seed)


def distractor_tasks(count: int, *, context_length: int, n_distractors: int, seed: int = 0) -> list[Task]:
    """``count`` documents of the evaluation split whose asked fact is followed by ``n_distractors`` that resemble it.

    They are ``draw_similar_facts`` of the asked fact, which is in the first quarter of the document; the question follows
    them all. Lengths as in ``evaluation_tasks``. ``UsageError`` for impossible values.
    """
    _check_count(count)
    return [_distractor_task(index, context_length, n_distractors, seed) for index in range(count)]


def copy_tasks(count: int, *, context_length: int, cue_length: int = 16, answer_length: int = 32, seed: int = 0) -> list[Task]:
    """``count`` documents of random words, then ``cue_length`` consecutive words of them again: the answer continues them.

    The bundled model was trained on random word sequences that are repeated. ``context_length``: tokens, ``<bos>``, cue and
    answer included. ``UsageError`` for a document shorter than twice cue and answer.
    """
    _check_count(count)
    repeated = cue_length + answer_length
    n_words = context_length - 1 - repeated
    if min(cue_length, answer_length) < 1 or n_words < 2 * repeated:
        raise UsageError(
            "the document is too short to be copied from",
            got=f"context_length {context_length}, cue {cue_length}, answer {answer_length}",
            expected=f"a cue and an answer of at least 1 word, and a context of at least {1 + 3 * repeated}",
        )
    return [_copy_task(index, n_words, cue_length, answer_length, seed) for index in range(count)]


def plain_text_tasks(count: int, *, context_length: int, answer_length: int = 64, seed: int = 0) -> list[Task]:
    """``count`` filler texts of the evaluation split, without facts: the last ``answer_length`` words are the answer.

    ``context_length``: tokens at most, ``<bos>`` and answer included. ``UsageError`` if no prompt would be left.
    """
    _check_count(count)
    if answer_length < 1 or context_length - 1 - answer_length < 2 * LONGEST_FILLER:
        raise UsageError(
            "the text is too short for its answer",
            got=f"context_length {context_length}, answer_length {answer_length}",
            expected=f"an answer of at least 1 word and a context at least {2 * LONGEST_FILLER + 1} longer",
        )
    tasks = []
    for index in range(count):
        sentences = filler_sentences(_rng("evaluation", "text", seed, index), context_length - 1)
        words = [word for sentence in sentences for word in sentence]
        prompt, answer = words[:-answer_length], words[-answer_length:]
        tasks.append(
            Task(
                kind="text",
                prompt=" ".join(prompt),
                answer=" ".join(answer),
                split="evaluation",
                seed=seed,
                index=index,
                n_facts=0,
                fact_distance=None,
                n_question_words=0,
            )
        )
    return tasks


def _fact_tasks(
    split: Split, count: int, *, context_length: int, n_facts: Sequence[int], distance: int | Region | None, seed: int
) -> list[Task]:
    _check_count(count)
    if not n_facts:
        raise UsageError("n_facts is empty", got=list(n_facts), expected="at least one number")
    return [
        _fact_task(
            split, index, context_length=context_length, n_facts=n_facts[index % len(n_facts)], distance=distance, seed=seed
        )
        for index in range(count)
    ]


def _fact_task(
    split: Split, index: int, *, context_length: int, n_facts: int, distance: int | Region | None, seed: int
) -> Task:
    rng = _rng(split, "fact", seed, index)
    facts = draw_facts(rng, n_facts, split)
    asked = rng.choice(facts)
    room = context_length - 1 - len(asked.question) - len(asked.sentence) - sum(len(fact.sentence) for fact in facts)
    if room < 0:
        raise UsageError(
            f"{n_facts} facts do not fit into the context",
            got=f"{context_length} tokens",
            expected=f"at least {context_length - room}",
        )
    others = [list(fact.sentence) for fact in facts if fact is not asked] + filler_sentences(rng, room)
    rng.shuffle(others)
    sentences, fact_distance = place_sentence(others, asked.sentence, _distance_in_words(rng, others, distance))
    return _asking(asked, sentences, fact_distance, split=split, seed=seed, index=index, n_facts=n_facts)


def _distractor_task(index: int, context_length: int, n_distractors: int, seed: int) -> Task:
    rng = _rng("evaluation", "distractors", seed, index)
    (asked,) = draw_facts(rng, 1, "evaluation")
    similar = [list(fact.sentence) for fact in draw_similar_facts(rng, asked, n_distractors)]
    body_length = context_length - 1 - len(asked.question) - 2 * len(asked.sentence)
    room = body_length - sum(map(len, similar))
    if room < 0:
        raise UsageError(
            f"{n_distractors} distractors do not fit into the context",
            got=f"{context_length} tokens",
            expected=f"at least {context_length - room}",
        )
    fillers = filler_sentences(rng, room)
    n_before = rng.randint(0, len(fillers) // 4)
    after = fillers[n_before:] + similar
    rng.shuffle(after)
    sentences = [*fillers[:n_before], list(asked.sentence), *after]
    fact_distance = sum(map(len, after))
    return _asking(asked, sentences, fact_distance, split="evaluation", seed=seed, index=index, n_facts=1 + n_distractors)


def _copy_task(index: int, n_words: int, cue_length: int, answer_length: int, seed: int) -> Task:
    rng = _rng("evaluation", "copy", seed, index)
    said = rng.choices(VOCABULARY[len(SPECIAL_TOKENS) :], k=n_words)
    start = rng.randint(0, n_words - cue_length - answer_length)
    cue_end = start + cue_length
    return Task(
        kind="copy",
        prompt=" ".join(said + said[start:cue_end]),
        answer=" ".join(said[cue_end : cue_end + answer_length]),
        split="evaluation",
        seed=seed,
        index=index,
        n_facts=0,
        fact_distance=n_words - cue_end - answer_length,
        n_question_words=cue_length,
    )


def _asking(
    asked: Fact, sentences: Sequence[Sequence[str]], fact_distance: int, *, split: Split, seed: int, index: int, n_facts: int
) -> Task:
    """The task of a document of ``sentences`` followed by the question for ``asked``."""
    document = [word for sentence in sentences for word in sentence]
    return Task(
        kind="fact",
        prompt=" ".join([*document, *asked.question]),
        answer=" ".join(asked.sentence),
        split=split,
        seed=seed,
        index=index,
        n_facts=n_facts,
        fact_distance=fact_distance,
        n_question_words=len(asked.question),
    )


def _distance_in_words(rng: random.Random, others: list[list[str]], distance: int | Region | None) -> int:
    """The requested number of words after the asked fact, in a document whose other sentences are ``others``."""
    longest = sum(map(len, others))
    if distance is None:
        return sum(map(len, others[rng.randint(0, len(others)) :]))
    if isinstance(distance, str):
        if distance not in REGIONS:
            raise UsageError(
                "the distance of the asked fact is unknown", got=repr(distance), expected=f"words, or one of {REGIONS}"
            )
        third = REGIONS.index(distance)
        return round(rng.uniform(third, third + 1) / 3 * longest)
    if not 0 <= distance <= longest:
        raise UsageError("the asked fact cannot be so far from the end", got=distance, expected=f"0 to {longest} words")
    return distance


def _fact_counts_that_fit(context_length: int) -> tuple[int, ...]:
    """The ``FACT_COUNTS`` that fit into ``context_length`` tokens with facts of any length, or the smallest count."""
    room = context_length - 1 - LONGEST_QUESTION - LONGEST_FACT
    return tuple(n for n in FACT_COUNTS if n * LONGEST_FACT <= room) or FACT_COUNTS[:1]


def _check_count(count: int) -> None:
    if count < 1:
        raise UsageError("the number of tasks is below 1", got=count, expected="a count of at least 1")


def _rng(split: Split, kind: str, seed: int, index: int) -> random.Random:
    """A generator per task: task 7 is the same whether 10 or 100 are drawn."""
    return random.Random(f"{split}/{kind}/{seed}/{index}")
