"""A long prompt arrives while other sequences decode: the time between their tokens before, during and after its prefill."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import Row, rounded
from benchmarks.models import random_tokens
from benchmarks.serving.sides import ServedModel
from benchmarks.serving.traffic import request_of
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.engine_core import EngineCore
from trt_kv.runtime.request import Request

N_DECODING = 8
N_OTHERS = 48
"""Prompt tokens of the other sequences."""
COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7c3aed", "#8a9199")


@dataclass(frozen=True, kw_only=True)
class Gaps:
    """Times between tokens of a decoding sequence: end in seconds since the long prompt arrived, duration, and whether a chunk
    was read meanwhile; and ms of one chunk, here and with no other sequences.
    """

    at_s: Floats
    ms: Floats
    reading: np.ndarray
    chunk_ms: float
    chunk_alone_ms: float

    @property
    def before_ms(self) -> float:
        return float(np.median(self.ms[self.at_s <= 0]))

    @property
    def while_ms(self) -> float:
        """Mean, since chunks become longer along the prompt, and are divided by the mean chunk."""
        return float(self.ms[self.reading].mean())

    @property
    def after_ms(self) -> float:
        return float(np.median(self.ms[(self.at_s > 0) & ~self.reading]))


def measure(
    model: ServedModel, chunks: Sequence[int], *, n_prompt: int, n_around: int, rounds: int
) -> tuple[list[Row], dict[int, Gaps]]:
    """A row for each chunk size, medians over rounds in which all sizes take turns; and the last round's gaps."""
    cores = {chunk: model.core(max_sequences=N_DECODING + 1, chunk=chunk) for chunk in chunks}
    found: dict[int, list[Gaps]] = {chunk: [] for chunk in chunks}
    for turn in range(rounds):
        at = turn % len(chunks)
        for chunk in [*chunks[at:], *chunks[:at]]:
            found[chunk].append(_one(cores[chunk], model.config.vocab_size, n_prompt, n_around, -(-n_prompt // chunk)))
    return [_row(chunk, found[chunk]) for chunk in chunks], {chunk: found[chunk][-1] for chunk in chunks}


def _one(core: EngineCore, vocab_size: int, n_prompt: int, n_around: int, n_chunks: int) -> Gaps:
    """``n_around`` steps, the long prompt, ``n_around`` steps; then the same prompt alone."""
    limit = N_DECODING * -(-N_OTHERS // core.runner.chunk) + 3 * n_around + n_chunks
    others = [request_of(random_tokens(N_OTHERS, vocab_size, seed=seed), limit) for seed in range(N_DECODING)]
    core.add(others)
    core.wait(lambda: all(request.token_ids for request in others))
    _decode_on(core, others[-1], n_around)
    prompt = random_tokens(n_prompt, vocab_size, seed=N_DECODING)
    long = request_of(prompt, 1)
    core.add([long])
    core.wait(lambda: long.is_finished)
    _decode_on(core, others[-1], n_around)
    for request in others:
        core.cancel(request)
    alone = request_of(prompt, 1)
    core.add([alone])
    core.wait(lambda: alone.is_finished)
    times = np.array(others[-1].times.tokens)
    assert long.times.admitted is not None
    begins, ends = times[:-1], times[1:]
    return Gaps(
        at_s=ends - long.times.arrived,
        ms=np.diff(times) * 1e3,
        reading=(ends > long.times.admitted) & (begins < long.times.tokens[0]),
        chunk_ms=long.times.prompt_s * 1e3 / n_chunks,
        chunk_alone_ms=alone.times.prompt_s * 1e3 / n_chunks,
    )


def _decode_on(core: EngineCore, request: Request, n_steps: int) -> None:
    until = len(request.token_ids) + n_steps
    core.wait(lambda: len(request.token_ids) >= until)


def _row(chunk: int, found: Sequence[Gaps]) -> Row:
    return {
        "chunk_tokens": chunk,
        "before_ms": rounded(np.median([one.before_ms for one in found])),
        "while_read_ms": rounded(np.median([one.while_ms for one in found])),
        "after_ms": rounded(np.median([one.after_ms for one in found])),
        "chunk_ms": rounded(np.median([one.chunk_ms for one in found])),
        "chunk_alone_ms": rounded(np.median([one.chunk_alone_ms for one in found])),
        "lengthening_per_chunk": rounded(np.median([(one.while_ms - one.before_ms) / one.chunk_ms for one in found])),
        "lengthening_per_chunk_alone": rounded(
            np.median([(one.while_ms - one.before_ms) / one.chunk_alone_ms for one in found])
        ),
    }


def draw(gaps: Mapping[int, Gaps], path: Path, *, title: str) -> None:
    """Time between tokens over time, a line per chunk size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for (chunk, one), colour in zip(gaps.items(), COLOURS, strict=False):
        label = f"chunks of {chunk} tokens, {one.chunk_alone_ms:.0f} ms each alone"
        axes.plot(one.at_s, one.ms, color=colour, marker="o", markersize=3, linewidth=1.2, label=label)
    axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xlabel("seconds since the long prompt arrived")
    axes.set_ylabel("ms between two tokens of a sequence that decodes")
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110, metadata={"Software": None})
