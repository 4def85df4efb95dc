"""What the benchmark of serving promises: sides get the same requests and say the same, and latencies are what clients saw."""

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.harness import Row
from benchmarks.models import FULL, Shape
from benchmarks.serving.arrivals import SATURATING, STATIC, targets
from benchmarks.serving.docs import README, measured_section
from benchmarks.serving.sides import GROUP, ServedModel, serve_continuously, serve_in_groups
from benchmarks.serving.traffic import Arrival, Lengths, Mix, Served, poisson, request_of
from trt_kv.hf_config import model_config_from_hf
from trt_kv.plugins.paging import Floats
from trt_kv.runtime.backends.base import Attend
from trt_kv.runtime.backends.step import Ints

SHAPE = Shape(n_layers=2, hidden_size=48, n_heads=6, n_kv_heads=3, head_dim=8, intermediate_size=7, vocab_size=101)
MIX = Mix(
    name="mixed",
    prompt=Lengths(median=11, sigma=0.9, least=3, most=37),
    answer=Lengths(median=5, sigma=0.9, least=1, most=13),
)


class NextByPosition:
    """A dense executor without a model: the next token follows from the last one and its position alone."""

    description = "arithmetic"

    def run(self, input_ids: Ints, positions: Ints, logit_rows: Ints, attend: Attend) -> Floats:
        zeros = [np.zeros((len(input_ids), n, SHAPE.head_dim), np.float32) for n in (SHAPE.n_heads, SHAPE.n_kv_heads)]
        for layer in range(SHAPE.n_layers):
            attend(layer, zeros[0], zeros[1], zeros[1])
        logits = np.zeros((len(logit_rows), SHAPE.vocab_size), np.float32)
        logits[np.arange(len(logit_rows)), (7 * input_ids + positions)[logit_rows] % SHAPE.vocab_size] = 1.0
        return logits


MODEL = ServedModel(
    executor=NextByPosition(), config=model_config_from_hf(SHAPE.hf_config, source="test"), policy=FULL, cache_tokens=512
)


def arrivals(*, n: int = 21, per_second: float = 2000.0) -> list[Arrival]:
    return poisson(MIX, n, per_second=per_second, vocab_size=SHAPE.vocab_size, seed=3)


def served_at(times: Sequence[Sequence[float]], *, arrived: float) -> Served:
    requests = [request_of([1], len(tokens)) for tokens in times]
    for request, tokens in zip(requests, times, strict=True):
        request.times.arrived, request.times.tokens = arrived, list(tokens)
    return Served(requests=requests, decode_steps=3)


def test_arrivals_are_poisson_and_the_same_for_every_side() -> None:
    many = arrivals(n=2000, per_second=50.0)
    assert many == arrivals(n=2000, per_second=50.0)
    assert np.diff([arrival.at_s for arrival in many]).mean() == pytest.approx(1 / 50, rel=0.1)
    assert {len(arrival.prompt_ids) for arrival in many} <= set(range(3, 38))
    assert {arrival.n_new for arrival in many} == set(range(1, 14))


@pytest.mark.parametrize("chunk", [5, 64])
def test_both_sides_say_the_same_and_all_that_was_asked_for(chunk: int) -> None:
    wanted = arrivals()
    core = MODEL.core(max_sequences=11, chunk=chunk)
    ours, theirs = serve_continuously(core, wanted), serve_in_groups(MODEL.runner(chunk), wanted)
    for side in (ours, theirs):
        assert [len(request.token_ids) for request in side.requests] == [arrival.n_new for arrival in wanted]
    assert [request.token_ids for request in ours.requests] == [request.token_ids for request in theirs.requests]
    assert core.runner.pool.n_free == core.runner.pool.n_pages


def test_a_static_group_starts_when_the_one_before_it_has_ended() -> None:
    requests = serve_in_groups(MODEL.runner(), arrivals(per_second=np.inf)).requests
    groups = [requests[first : first + GROUP] for first in range(0, len(requests), GROUP)]
    for group, following in itertools.pairwise(groups):
        assert max(request.times.tokens[-1] for request in group) < min(request.times.tokens[0] for request in following)


def test_light_loads_are_served_as_they_come() -> None:
    """Nothing starts before it has arrived, and waiting for arrivals is not waiting in a queue."""
    wanted = arrivals(n=5, per_second=20.0)
    for side in (serve_continuously(MODEL.core(max_sequences=3, chunk=64), wanted), serve_in_groups(MODEL.runner(), wanted)):
        assert all(request.times.tokens[0] > request.times.arrived for request in side.requests)
        assert side.makespan_s >= wanted[-1].at_s - wanted[0].at_s


def test_measures_are_those_of_the_clients() -> None:
    measures = served_at([[1.0, 2.0, 4.0], [3.0]], arrived=0.5).measures()
    assert measures["tokens_per_s"] == pytest.approx(4 / 3.5)
    assert measures["sequences_per_step"] == pytest.approx(2 / 3)
    assert measures["between_tokens_p50_ms"] == pytest.approx(1500)
    assert measures["mean_between_tokens_p95_ms"] == pytest.approx(1500)
    assert measures["first_token_p50_ms"] == pytest.approx(1500)


def row(side: str, throughput: float, p95: float) -> Row:
    return {"mix": "m", "load": SATURATING, "side": side, "throughput_ratio": throughput, "between_tokens_p95_ratio": p95}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([row(STATIC, 1.0, 1.0), row("a", 1.6, 0.7), row("b", 2.5, 0.9), row("c", 4.0, 1.2)], [0.9, 0.4]),
        ([row(STATIC, 1.0, 1.0), row("a", 1.6, 1.3), row("c", 4.0, 1.2)], [1.2, 0.25]),
    ],
)
def test_the_promise_is_judged_by_the_setting_that_comes_closest(rows: list[Row], expected: list[float]) -> None:
    assert [target.measured for target in targets("a model", rows)] == expected


def test_the_measured_tables_are_those_of_the_results() -> None:
    assert measured_section() in README.read_text(), "run: python -m benchmarks.serving.docs"
