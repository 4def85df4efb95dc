"""A prompt chunk and a decode batch in one token-flat step, compared with two steps: time and bit-equality."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.harness import Check, Row, check_close, take_turns
from benchmarks.models import random_tokens
from trt_kv.model_config import ModelConfig
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.base import DenseExecutor
from trt_kv.runtime.backends.step import Ints

IN_TURN, MIXED = "chunk, then batch", "mixed"
AGREE_WITHIN = 1e-3
CONTEXT = 512
"""Position of the decoded tokens and of the chunk's first one."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Tokens of a step, their positions, and those whose logits are needed."""

    ids: Ints
    positions: Ints
    logit_rows: Ints

    def __add__(self, other: "Rows") -> "Rows":
        return Rows(
            ids=np.concatenate([self.ids, other.ids]),
            positions=np.concatenate([self.positions, other.positions]),
            logit_rows=np.concatenate([self.logit_rows, len(self.ids) + other.logit_rows]),
        )


def measure(
    executor: DenseExecutor, config: ModelConfig, sizes: Sequence[tuple[int, int]], *, rounds: int
) -> tuple[list[Row], list[Check]]:
    """Rows for each (tokens of the chunk, sequences of the batch). Attention is replaced by ``out = q``."""
    rows: list[Row] = []
    checks: list[Check] = []
    for n_chunk, n_batch in sizes:
        chunk = Rows(
            ids=np.array(random_tokens(n_chunk, config.vocab_size, seed=1), np.int64),
            positions=CONTEXT + np.arange(n_chunk),
            logit_rows=np.array([n_chunk - 1]),
        )
        batch = Rows(
            ids=np.array(random_tokens(n_batch, config.vocab_size, seed=2), np.int64),
            positions=np.full(n_batch, CONTEXT),
            logit_rows=np.arange(n_batch),
        )
        what = f"chunk of {n_chunk} and {n_batch} sequences"
        apart = [np.concatenate(parts) for parts in zip(_values(executor, chunk), _values(executor, batch), strict=True)]
        together = _values(executor, chunk + batch)
        checks.append(check_close(f"logits, {what}", together[-1], apart[-1], within=AGREE_WITHIN))
        sides = {
            IN_TURN: functools.partial(_run_in_turn, executor, chunk, batch),
            MIXED: functools.partial(_run, executor, chunk + batch),
        }
        timings = take_turns(sides, rounds=rounds, warmup=1)
        rows += [
            {
                "chunk_tokens": n_chunk,
                "sequences": n_batch,
                **row,
                "same_bits_of_last_keys_percent": _same_percent(together[-2], apart[-2]),
                "same_bits_of_logits_percent": _same_percent(together[-1], apart[-1]),
                "largest_difference_of_logits": float(f"{np.abs(together[-1] - apart[-1]).max():.3g}"),
            }
            for row in timings.rows(IN_TURN)
        ]
    return rows, checks


class _Keys:
    """``out = q`` in place of attention; optionally keeps the keys of each layer."""

    def __init__(self, *, keep: bool) -> None:
        self.of_layers: list[Floats] = []
        self._keep = keep

    def __call__(self, layer: int, q: Floats, k: Floats, v: Floats) -> Floats:
        if self._keep:
            self.of_layers.append(np.array(k))
        return q


def _values(executor: DenseExecutor, rows: Rows) -> list[Floats]:
    """Keys of each layer [N, K, D], and logits [R, V]."""
    keys = _Keys(keep=True)
    logits = executor.run(rows.ids, rows.positions, rows.logit_rows, keys)
    return [*keys.of_layers, logits]


def _run(executor: DenseExecutor, rows: Rows) -> None:
    executor.run(rows.ids, rows.positions, rows.logit_rows, _Keys(keep=False))


def _run_in_turn(executor: DenseExecutor, chunk: Rows, batch: Rows) -> None:
    _run(executor, chunk)
    _run(executor, batch)


def _same_percent(ours: Floats, theirs: Floats) -> float:
    """Share of rows that are equal bit for bit."""
    same = (ours.view(np.uint32) == theirs.view(np.uint32)).reshape(len(ours), -1).all(axis=1)
    return round(100 * float(same.mean()), 1)
