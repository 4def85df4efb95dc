"""Tasks as token ids with the right answer."""

from collections.abc import Callable
from dataclasses import dataclass

from trt_kv.calibration.tasks import Task
from trt_kv.errors import UsageError

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One task as token ids: ``prompt`` is prefilled (and evicted from), ``given`` is fed token by token, ``answer`` is right.

    ``fact`` and ``question``: positions of the requested fact and of the question in the prompt; empty if they are not in it.
    """

    prompt: tuple[int, ...]
    given: tuple[int, ...]
    answer: tuple[int, ...]
    fact: range
    question: range

    @property
    def fed(self) -> tuple[int, ...]:
        """Everything after the prompt, in order."""
        return self.given + self.answer

    @property
    def first_counted(self) -> int:
        """Index into ``fed`` from which the answer counts for perplexity: the prefill, before eviction, predicts index 0."""
        return max(1, len(self.given))


def case_from_task(task: Task, encode: Encode, *, question_known: bool = True) -> Case:
    """A task's token ids; with ``question_known`` False its question comes only after eviction from the prompt.

    ``encode`` must add only ``<bos>`` and encode each word as one token, else ``UsageError``.
    """
    words = task.prompt.split()
    n_document = len(words) - task.n_question_words
    prompt_words = words if question_known else words[:n_document]
    bos, *answer = encode(task.answer)
    prompt = encode(" ".join(prompt_words))
    given = encode(" ".join(words[len(prompt_words) :]))[1:]
    if prompt[0] != bos or len(prompt) + len(given) != task.n_prompt_tokens or len(answer) != task.n_answer_tokens:
        raise UsageError(
            "the tasks are not in this tokenizer's language",
            got=f"{len(prompt) + len(given)} tokens for {len(words)} words",
            expected="<bos> and one token per word",
        )
    fact_end = 1 + n_document - task.fact_distance if task.fact_distance is not None else 0
    fact = range(fact_end - len(answer), fact_end) if task.fact_distance is not None else range(0)
    return Case(
        prompt=tuple(prompt),
        given=tuple(given),
        answer=tuple(answer),
        fact=fact,
        question=range(1 + n_document, len(prompt)),
    )
