"""Prompts to calibrate with and tasks to evaluate with, in the bundled model's synthetic English.

Prompts are words separated by single spaces, without ``<bos>``: the tokenizer adds it. Facts belong to one split each, by
their own words, so calibration and evaluation never share a document (``synthetic_english.Fact.split``).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from trt_kv.calibration.synthetic_english import (
    LONGEST_FACT,
    LONGEST_FILLER,
    LONGEST_QUESTION,
    Split,
    draw_facts,
    filler_sentences,
    place_sentence,
)
from trt_kv.errors import UsageError

Region = Literal["near", "middle", "far"]
REGIONS: tuple[Region, ...] = ("near", "middle", "far")
FACT_COUNTS = (4, 8, 16, 32)


@dataclass(frozen=True, kw_only=True)
class Task:
    """A prompt and the continuation that is right.

    ``kind`` "fact": the answer restates one fact of the document and must come out word for word. ``kind`` "text": the
    answer is just more text, for perplexity. ``n_facts``: facts in the document; ``fact_distance``: words between the end
    of the asked fact and the end of the document (the question not counted), None for ``text``. ``split``, ``seed`` and
    ``index`` tell how to draw the task again.
    """

    kind: Literal["fact", "text"]
    prompt: str
    answer: str
    split: Split
    seed: int
    index: int
    n_facts: int
    fact_distance: int | None

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

    ``context_length``: tokens at most, ``<bos>`` and the answer included. ``n_facts``: facts per document, taken in turn;
    None takes those of 4, 8, 16, 32 that fit. ``UsageError`` for a count below 1 or a context too short for the facts.
    """
    counts = tuple(n_facts) if n_facts is not None else _fact_counts_that_fit(context_length)
    return _fact_tasks("calibration", count, context_length=context_length, n_facts=counts, distance=None, seed=seed)


def evaluation_tasks(
    count: int, *, context_length: int, n_facts: int, distance: int | Region | None = None, seed: int = 0
) -> list[Task]:
    """``count`` documents of the evaluation split, one question at the end of each.

    ``context_length``: tokens at most, ``<bos>``, question and answer included; at most one filler sentence less.
    ``distance`` of the asked fact: words between it and the end of the document (met to within half a sentence), or its
    ``near``, ``middle`` or ``far`` third, or None for anywhere. ``UsageError`` for impossible values.
    """
    return _fact_tasks("evaluation", count, context_length=context_length, n_facts=(n_facts,), distance=distance, seed=seed)


def plain_text_tasks(count: int, *, context_length: int, answer_length: int = 64, seed: int = 0) -> list[Task]:
    """``count`` filler texts of the evaluation split, without facts: the last ``answer_length`` words are the answer.

    ``context_length``: tokens at most, ``<bos>`` and answer included. ``UsageError`` when no prompt would be left.
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
            )
        )
    return tasks


def _fact_tasks(
    split: Split, count: int, *, context_length: int, n_facts: Sequence[int], distance: int | Region | None, seed: int
) -> list[Task]:
    _check_count(count)
    if not n_facts:
        raise UsageError("no number of facts is given", got=list(n_facts), expected="at least one number")
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
    body_length = context_length - 1 - len(asked.question) - len(asked.sentence)
    room = body_length - sum(len(fact.sentence) for fact in facts)
    if room < 0:
        raise UsageError(
            f"{n_facts} facts do not fit into the context",
            got=f"{context_length} tokens",
            expected=f"at least {context_length - room}",
        )
    others = [list(fact.sentence) for fact in facts if fact is not asked] + filler_sentences(rng, room)
    rng.shuffle(others)
    sentences, fact_distance = place_sentence(others, asked.sentence, _distance_in_words(rng, others, distance))
    return Task(
        kind="fact",
        prompt=" ".join([word for sentence in sentences for word in sentence] + list(asked.question)),
        answer=" ".join(asked.sentence),
        split=split,
        seed=seed,
        index=index,
        n_facts=n_facts,
        fact_distance=fact_distance,
    )


def _distance_in_words(rng: random.Random, others: list[list[str]], distance: int | Region | None) -> int:
    """The wanted number of words after the asked fact, in a document whose other sentences are ``others``."""
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
    """Those usual numbers of facts that a document of ``context_length`` tokens surely has room for, or the smallest."""
    room = context_length - 1 - LONGEST_QUESTION - LONGEST_FACT
    return tuple(n for n in FACT_COUNTS if n * LONGEST_FACT <= room) or FACT_COUNTS[:1]


def _check_count(count: int) -> None:
    if count < 1:
        raise UsageError("no task is asked for", got=count, expected="a count of at least 1")


def _rng(split: Split, kind: str, seed: int, index: int) -> random.Random:
    """Each task has its own random numbers: task 7 is the same whether 10 or 100 are drawn."""
    return random.Random(f"{split}/{kind}/{seed}/{index}")
