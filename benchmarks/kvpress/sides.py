"""The bundled model on both sides, kvpress's on transformers and ours on ONNX Runtime, and the tokens that each keeps.

L layers, K KV heads, N tokens of the prompt, S tokens kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from benchmarks.kvpress.pairs import Pair
from benchmarks.kvpress.presses import Floats, Ints, PressRun, eager_model, run_press
from benchmarks.models import model_runner
from trt_kv.calibration.tasks import Task, evaluation_tasks, plain_text_tasks
from trt_kv.model_config import ModelConfig
from trt_kv.policy import Policy
from trt_kv.presets import PRESETS
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.model_runner import ModelRunner

FOLDER = PRESETS["llama3"].bundled_folder
CHUNK = 96
"""Tokens per prefill step on our side: documents need several steps, and the observation window spans two of them."""
ROUNDING = 1e-4
"""Relative distance of scores that may change places: both sides compute in fp32 in different orders, through all layers."""

FEW = 1e-3
"""Share of the kept tokens that may have changed places."""


def documents() -> list[Task]:
    """Two documents with facts and a question, and one of plain text; their lengths differ, and one is odd."""
    return [*evaluation_tasks(2, context_length=400, n_facts=8), *plain_text_tasks(1, context_length=365)]


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """Tokens kept by each side and by both, over all layers and heads.

    ``misplaced``: tokens that two cuts of the same ranking could not explain: those kept by only one side if both keep the same
    number in a head, else those of the smaller set that the larger one lacks. ``worst_gap``: largest relative distance of
    their scores (kvpress's) from that of the last token kept by kvpress.
    """

    kvpress: int
    ours: int
    both: int
    misplaced: int
    worst_gap: float

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(
            kvpress=self.kvpress + other.kvpress,
            ours=self.ours + other.ours,
            both=self.both + other.both,
            misplaced=self.misplaced + other.misplaced,
            worst_gap=max(self.worst_gap, other.worst_gap),
        )


class Sides:
    """Runs one prompt under a press, or under a policy on ``executor``."""

    def __init__(self, executor: DenseExecutor, config: ModelConfig) -> None:
        self._executor = executor
        self._config = config
        self._model = eager_model(FOLDER)
        self._known: dict[tuple[str, str, float, tuple[int, ...]], tuple[PressRun, tuple[Ints, ...]]] = {}
        self._tokenizer = Tokenizer.from_file(str(FOLDER / "tokenizer.json"))

    def encode(self, task: Task) -> list[int]:
        return list(self._tokenizer.encode(task.prompt).ids)

    def both(self, pair: Pair, share: float, token_ids: Sequence[int]) -> tuple[PressRun, tuple[Ints, ...]]:
        """The tokens that ``pair`` keeps at ``share``, kvpress's side and ours; cached."""
        key = (pair.press, pair.named, share, tuple(token_ids))
        if key not in self._known:
            self._known[key] = (self.press(pair.press_at(share), token_ids), self.kept(pair.policy_at(share), token_ids))
        return self._known[key]

    def press(self, press: Any, token_ids: Sequence[int]) -> PressRun:
        return run_press(press, self._model, token_ids)

    def kept(self, policy: Policy, token_ids: Sequence[int], *, kept_shares: list[float] | None = None) -> tuple[Ints, ...]:
        """Positions that ``policy`` keeps, per layer [K, S], ascending; ``kept_shares``: optional shares of the layers."""
        runner = self._runner(policy, token_ids, kept_shares)
        sequence = runner.new_sequence()
        runner.prefill(sequence, token_ids)
        return tuple(np.sort(runner.kept_positions(sequence, layer), axis=1) for layer in range(self._config.n_layers))

    def scores(self, policy: Policy, token_ids: Sequence[int]) -> Floats:
        """Scores by which ``policy`` ranks the tokens, [L, K, N]."""
        scores_LKN: Floats = self._runner(policy, token_ids, None).importance(token_ids)
        return scores_LKN

    def _runner(self, policy: Policy, token_ids: Sequence[int], kept_shares: list[float] | None) -> ModelRunner:
        return model_runner(
            self._executor,
            self._config,
            cache_tokens=len(token_ids),
            policy=policy,
            kept_shares=kept_shares,
            chunk=CHUNK,
        )


def overlap(run: PressRun, ours: Sequence[Ints]) -> Overlap:
    """The overlap of the sets of a press and ours, per layer [K, S]."""
    total = Overlap(kvpress=0, ours=0, both=0, misplaced=0, worst_gap=0.0)
    for scores_KN, theirs_KS, ours_KS in zip(run.scores, run.kept, ours, strict=True):
        for scores_N, theirs_S, ours_S in zip(scores_KN, theirs_KS, ours_KS, strict=True):
            smaller, larger = sorted((theirs_S, ours_S), key=len)
            cut = scores_N[theirs_S].min()
            as_many = len(smaller) == len(larger)
            misplaced = np.setxor1d(smaller, larger) if as_many else np.setdiff1d(smaller, larger)
            gaps = np.abs(scores_N[misplaced] - cut) / max(abs(float(cut)), np.finfo(np.float32).tiny)
            total += Overlap(
                kvpress=len(theirs_S),
                ours=len(ours_S),
                both=len(np.intersect1d(theirs_S, ours_S)),
                misplaced=len(misplaced),
                worst_gap=float(gaps.max(initial=0.0)),
            )
    return total
