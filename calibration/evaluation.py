"""What a quality report compares: variants of score and budget, and tasks as token ids with the right answer.

A variant is a score (which tokens are worth keeping) times an allocation (how many of them each layer keeps); all variants
of one mean kept share hold the same number of tokens in all. L layers, N tokens of a prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from trt_kv.calibration.prefixkv import online_budget
from trt_kv.calibration.tasks import Task
from trt_kv.errors import UsageError
from trt_kv.policy import kept_tokens
from trt_kv.recipe import Protected, Recipe

Score = Literal["none", "mass", "window", "random", "recency"]
Allocation = Literal["full", "uniform", "recipe", "online"]
Floats = npt.NDArray[np.floating[Any]]
Encode = Callable[[str], list[int]]
QUESTION = "question"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to shrink a cache.

    ``score``: "mass" and "window" as in ``trt_kv.policy``; "random" ranks tokens by lot, "recency" by position. ``allocation``:
    the same share for every layer, a calibrated recipe's shares, or shares searched for the very input. ``recipe_score``: whose
    recipe (or search) it is, where that is not ``score``. ``sinks`` first and ``recent`` last tokens are never evicted.
    """

    name: str
    label: str
    score: Score
    allocation: Allocation
    recipe_score: Literal["mass", "window"] | None = None
    sinks: int = 1
    recent: int = 1

    @property
    def protected(self) -> Protected:
        return Protected(sinks=self.sinks, recent=self.recent)

    @property
    def budget_score(self) -> Literal["mass", "window"] | None:
        """The score whose curves set the layers' budgets; None where no curve does."""
        if self.allocation in ("full", "uniform"):
            return None
        return self.recipe_score or ("window" if self.score == "window" else "mass")


FULL = Variant(name="full", label="full cache", score="none", allocation="full")
VARIANTS = (
    Variant(name="prefixkv", label="mass score, its recipe (prefixkv)", score="mass", allocation="recipe"),
    Variant(name="mass-online", label="mass score, searched per input", score="mass", allocation="online"),
    Variant(name="mass-uniform", label="mass score, uniform layers", score="mass", allocation="uniform"),
    Variant(name="mass-recent", label="prefixkv, last 32 tokens protected", score="mass", allocation="recipe", recent=32),
    Variant(name="window", label="window score, its recipe", score="window", allocation="recipe"),
    Variant(name="window-online", label="window score, searched per input", score="window", allocation="online"),
    Variant(name="window-uniform", label="window score, uniform layers", score="window", allocation="uniform"),
    Variant(name="random", label="random tokens, prefixkv's budgets", score="random", allocation="recipe", recipe_score="mass"),
    Variant(name="recency", label="4 sinks and recent tokens, uniform layers", score="recency", allocation="uniform", sinks=4),
)


@dataclass(frozen=True, kw_only=True)
class LayerBudgets:
    """``tokens`` that each of L layers keeps of a prompt, and the share at which it grows while decoding."""

    tokens: tuple[int, ...]
    growth: tuple[float, ...]


def layer_budgets(
    variant: Variant,
    share: float,
    *,
    n_tokens: int,
    n_layers: int,
    recipes: Mapping[str, Recipe],
    importance: Mapping[str, Floats],
) -> LayerBudgets:
    """What ``variant`` keeps of a prompt of ``n_tokens`` at the mean kept ``share``, exactly as an engine would.

    ``recipes``: by score, all for ``share``. ``importance``: by score, [L, N] of this very prompt, for online searches.
    ``UsageError`` for a recipe of another budget.
    """
    if variant.allocation in ("full", "uniform"):
        growth = [1.0 if variant.allocation == "full" else share] * n_layers
        tokens = [kept_tokens(n_tokens, share) for share in growth]
    elif variant.allocation == "recipe":
        recipe = recipes[str(variant.budget_score)]
        if recipe.budget != share:
            raise UsageError("the recipe was made for another budget", got=recipe.budget, expected=share)
        tokens, growth = recipe.kept_tokens(n_tokens), list(recipe.kept)
    else:
        found_L = online_budget(importance[str(variant.budget_score)], share, protected=variant.protected)
        tokens, growth = found_L.tolist(), (found_L / n_tokens).tolist()
    return LayerBudgets(tokens=tuple(tokens), growth=tuple(growth))


@dataclass(frozen=True, kw_only=True)
class Case:
    """One task as token ids: ``prompt`` is prefilled (and evicted from), ``given`` is fed token by token, ``answer`` is due.

    ``fact`` and ``question``: where the asked fact and the question stand in the prompt; empty where they do not.
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
    """A task's token ids; with ``question_known`` False its question comes only after the prompt has been evicted from.

    ``encode`` adds ``<bos>`` and nothing else, and makes one token of each word. ``UsageError`` where it does not.
    """
    words = task.prompt.split()
    n_document = len(words) - words[::-1].index(QUESTION) - 1 if task.kind == "fact" else len(words)
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


def answer_losses(logits_TV: Floats, fed: Sequence[int]) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float64]]:
    """For each token of ``fed``: whether logits [T, V] rank it first, and its negative log-likelihood in nats, both [T]."""
    tokens_T = np.asarray(fed)
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(axis=1, keepdims=True)
    picked_T = shifted_TV[np.arange(len(tokens_T)), tokens_T]
    return logits_TV.argmax(axis=1) == tokens_T, np.log(np.exp(shifted_TV).sum(axis=1)) - picked_T
