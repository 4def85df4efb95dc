"""Eight ways in which the published system's background path can go wrong (races read in its code), and the guard against each.

Every test shows two things: with the guard the streamed result is the op's, bit for bit; with the guard taken away the same
comparison fails. A guard that does nothing would be found here.
"""

from collections.abc import Iterator
from threading import Event
from typing import Any

import numpy as np
import pytest

from benchmarks.speed.synchronous_copies import SynchronousCopies
from tests.recall_rig import RandomModel, StepwiseCopies, freekv, generate, prompt_of, runner_of
from trt_kv.errors import RecallError, TrtKvError
from trt_kv.plugins.paging import Floats, Ints
from trt_kv.plugins.recall_attention import choice as choices
from trt_kv.plugins.recall_attention import cpu as recall_attention
from trt_kv.policy import Policy
from trt_kv.runtime.backends.host.recall import background
from trt_kv.runtime.backends.host.recall import layer as layer_streams
from trt_kv.runtime.backends.host.recall.background import Copies, Job
from trt_kv.runtime.backends.host.recall.layer import LayerStreams
from trt_kv.runtime.backends.host.recall.working_set import Prefetch, WorkingSet

MODEL = RandomModel(steadiness=0.6)
POLICY = freekv(tokens=28, sinks=3, recent=2, tau=0.3)


def streams_like_the_op(copies: Copies, *, policy: Policy = POLICY, model: RandomModel = MODEL, n_new: int = 30) -> bool:
    """Whether a generation with ``copies`` gives the logits that the op gives; False where it does not even finish."""
    expected = generate(runner_of(model, policy), prompt_of(60), n_new)
    try:
        got = generate(runner_of(model, policy, copies=copies), prompt_of(60), n_new)
    except (AssertionError, IndexError, TrtKvError, ValueError):
        return False
    return np.array_equal(got, expected)


def test_1_a_recall_begins_when_its_query_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published: nothing makes the recall stream wait for the query (and the summaries) of its own step."""
    assert streams_like_the_op(StepwiseCopies(eagerness=1.0))
    recall_ahead = LayerStreams.recall_ahead
    earlier: dict[int, np.ndarray] = {}

    def with_the_query_before(self: LayerStreams, working_set: WorkingSet, *arguments: Any) -> None:
        own = working_set.query_HD
        working_set.query_HD = earlier.get(id(working_set), own)
        recall_ahead(self, working_set, *arguments)
        working_set.query_HD = earlier[id(working_set)] = own

    monkeypatch.setattr(LayerStreams, "recall_ahead", with_the_query_before)
    assert not streams_like_the_op(StepwiseCopies(eagerness=1.0))


def test_2_a_slot_is_not_overwritten_while_attention_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published: the scatter of the next step's pages does not wait for this step's attention."""
    assert streams_like_the_op(StepwiseCopies(eagerness=1.0))

    def without_waiting(moves_M4: Ints, _prefetch: Prefetch) -> Iterator[Ints | Event]:
        yield from (moves_M4[m : m + 1] for m in range(len(moves_M4)))

    monkeypatch.setattr(layer_streams, "in_turn", without_waiting)
    assert not streams_like_the_op(StepwiseCopies(eagerness=1.0))


def test_3_a_step_waits_for_its_own_prefetch_and_not_for_an_older_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published: an event recorded again and again by a worker can still stand from the step before."""
    assert streams_like_the_op(StepwiseCopies(eagerness=0.0))
    always_set = Event()
    always_set.set()
    create = Job.__init__

    def with_the_event_of_another(self: Job, *arguments: Any, **named: Any) -> None:
        create(self, *arguments, **named)
        if self.what == "recalling pages":
            self.done = always_set

    monkeypatch.setattr(Job, "__init__", with_the_event_of_another)
    assert not streams_like_the_op(StepwiseCopies(eagerness=0.0))


def test_4_a_prefetch_owns_what_it_says_about_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published: one buffer of flags for all layers, which the next layer's test may rewrite before a worker reads it."""
    assert streams_like_the_op(StepwiseCopies(eagerness=0.0))
    shared = Prefetch()

    def the_only_prefetch(held_KS: np.ndarray) -> Prefetch:
        shared.held_KS = held_KS
        return shared

    monkeypatch.setattr(layer_streams, "Prefetch", the_only_prefetch)
    assert not streams_like_the_op(StepwiseCopies(eagerness=0.0))


def test_5_copies_of_two_layers_never_share_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published: one pair of staging buffers for all layers, filled from several threads."""
    assert streams_like_the_op(StepwiseCopies(eagerness=0.5))
    make_room = WorkingSet.make_room
    shared: list[int] = []

    def in_shared_pages(self: WorkingSet, n_slots: int) -> None:
        make_room(self, n_slots)
        shared.extend(self._slots[len(shared) :])
        self._slots = shared

    monkeypatch.setattr(WorkingSet, "make_room", in_shared_pages)
    assert not streams_like_the_op(StepwiseCopies(eagerness=0.5))


def test_6_an_error_in_the_background_surfaces_where_its_layer_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published: the future of a job is thrown away, and its exception with it."""

    def fails() -> bool:
        runner = runner_of(MODEL, POLICY, copies=StepwiseCopies(fail_at=1))
        try:
            generate(runner, prompt_of(60), 30)
        except RecallError:
            return True
        return False

    assert fails()
    monkeypatch.setattr(layer_streams, "join", lambda copies, job: copies.settle(job))
    assert not fails()


def test_7_a_recall_begins_when_the_pages_it_reads_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published: neither the backup of a prompt nor the first recall after it waits for the other."""
    orders = [StepwiseCopies(seed, eagerness=0.4) for seed in range(4)]
    assert all(streams_like_the_op(copies) for copies in orders)
    create = Job.__init__

    def after_nothing(self: Job, what: str, work: background.Work, *, after: Job | None) -> None:
        create(self, what, work, after=None)

    monkeypatch.setattr(Job, "__init__", after_nothing)
    assert not all(streams_like_the_op(StepwiseCopies(seed, eagerness=0.4)) for seed in range(4))


def test_8_equal_pages_are_chosen_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Published: scores in bf16 tie, and which of two equal pages stays is left to chance. Here the lower page is chosen."""
    values_J = np.array([1.0, 3.0, 1.0, 3.0, 1.0, 0.5], np.float32)
    best_C = np.empty(3, np.int64)
    choices._best(values_J, 10, best_C)
    assert best_C.tolist() == [10, 11, 13]

    def every_page_the_same(k_MKPD: Floats, *_: Any) -> Floats:
        return np.zeros((*k_MKPD.shape[:2], 2, k_MKPD.shape[3]), np.float32)

    for module in (layer_streams, recall_attention):
        monkeypatch.setattr(module, "summaries_of", every_page_the_same)
    assert streams_like_the_op(SynchronousCopies())
    expected = generate(runner_of(MODEL, POLICY), prompt_of(60), 30)
    by_lot = np.random.default_rng(0)

    def any_of_the_equal(_probe: Floats, _table: Ints, first_B: Ints, n_between_B: Ints, n_chosen_B: Ints, *_: Any) -> Ints:
        chosen = [np.sort(first_B[0] + by_lot.permutation(n_between_B[0])[: n_chosen_B[0]]) for _ in range(MODEL.n_kv_heads)]
        return np.stack(chosen)[None]

    monkeypatch.setattr(recall_attention, "choose_pages", any_of_the_equal)
    assert not np.array_equal(generate(runner_of(MODEL, POLICY), prompt_of(60), 30), expected)
