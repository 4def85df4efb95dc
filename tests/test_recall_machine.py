"""Requests that come, decode together and go in any order, copies that run in any order and sometimes fail; and long ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from benchmarks.speed.synchronous_copies import SynchronousCopies
from tests.recall_rig import VOCABULARY, RandomModel, StepwiseCopies, check_integrity, freekv, prompt_of, runner_of
from trt_kv.errors import RecallError
from trt_kv.runtime.backends.host.recall.background import Copies, ThreadedCopies
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.store import host_tier_at
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.model_runner import ModelRunner

MODEL = RandomModel(n_layers=2, max_positions=1000)


class RecallMachine(RuleBasedStateMachine):
    """Every request lives twice: in the op over a whole cache, and in a stream over two tiers."""

    @initialize(
        seed=st.integers(0, 10**6),
        eagerness=st.sampled_from([0.0, 0.4, 0.9, 1.0]),
        tau=st.sampled_from([-1.01, 0.3, 0.7, 1.01]),
        tokens=st.integers(12, 40),
        page_size=st.integers(1, 5),
    )
    def begin(self, seed: int, eagerness: float, tau: float, tokens: int, page_size: int) -> None:
        policy = freekv(tokens=tokens, tau=tau)
        self.copies = StepwiseCopies(seed, eagerness=eagerness)
        self.op = runner_of(MODEL, policy, page_size=page_size)
        self.streamed = runner_of(MODEL, policy, page_size=page_size, copies=self.copies)
        self.alive: list[tuple[SequenceCache, SequenceCache]] = []

    @precondition(lambda self: len(self.alive) < 4)
    @rule(n_prompt=st.integers(1, 60))
    def start(self, n_prompt: int) -> None:
        pair = self.op.new_sequence(), self.streamed.new_sequence()
        prompt = prompt_of(n_prompt, seed=n_prompt)
        expected = self.op.prefill(pair[0], prompt)
        try:
            got = self.streamed.prefill(pair[1], prompt)
        except RecallError:
            self.drop(pair)
        else:
            np.testing.assert_array_equal(got, expected)
            self.alive.append(pair)

    @precondition(lambda self: self.alive)
    @rule(data=st.data(), n_steps=st.integers(1, 12))
    def decode(self, data: st.DataObject, n_steps: int) -> None:
        chosen = sorted(data.draw(st.sets(st.integers(0, len(self.alive) - 1), min_size=1), label="sequences"))
        pairs = [self.alive[index] for index in chosen]
        for step in range(n_steps):
            tokens = [(7 * step + index) % VOCABULARY for index in range(len(pairs))]
            expected = self.op.decode([pair[0] for pair in pairs], tokens)
            got = self.streamed._decode_step([pair[1] for pair in pairs], tokens)
            failed = [pair[1].failure is not None for pair in pairs]
            for one, other, has_failed in zip(got, expected, failed, strict=True):
                assert has_failed or np.array_equal(one, other)
            for pair in [pair for pair, has_failed in zip(pairs, failed, strict=True) if has_failed]:
                self.drop(pair)
            pairs = [pair for pair, has_failed in zip(pairs, failed, strict=True) if not has_failed]
            if not pairs:
                return

    @precondition(lambda self: self.alive)
    @rule(index=st.integers(0, 3))
    def finish(self, index: int) -> None:
        self.drop(self.alive[index % len(self.alive)])

    @rule(within=st.integers(1, 50))
    def let_a_copy_fail(self, within: int) -> None:
        self.copies.fail_at = self.copies.n_steps + within

    @invariant()
    def no_page_is_lost(self) -> None:
        if hasattr(self, "op"):
            check_integrity(self.op, *(pair[0] for pair in self.alive))
            check_integrity(self.streamed, *(pair[1] for pair in self.alive))

    def drop(self, pair: tuple[SequenceCache, SequenceCache]) -> None:
        for sequence in pair:
            sequence.release()
        self.alive = [other for other in self.alive if other is not pair]

    def teardown(self) -> None:
        for pair in list(getattr(self, "alive", [])):
            self.drop(pair)
        if hasattr(self, "streamed"):
            assert isinstance(self.streamed.tiers, StreamedRecall)
            assert sum(self.streamed.tiers.used_bytes.values()) == 0


TestRecallMachine = RecallMachine.TestCase
TestRecallMachine.settings = settings(max_examples=40, stateful_step_count=15)


def long_generation(copies: Copies, tmp_path: Path, n_new: int) -> tuple[list[int], list[dict[str, int]], ModelRunner]:
    """Greedy tokens, and the bytes in use every 500 tokens."""
    model = RandomModel(n_layers=2, head_size=4, max_positions=n_new + 100)
    sizes: dict[str, Any] = {
        "n_pages": 2 * (n_new // 16 + 10),
        "page_size": 16,
        "n_kv_heads": model.n_kv_heads,
        "head_size": model.head_size,
    }
    host = host_tier_at(f"file:{tmp_path}", **sizes)
    runner = runner_of(model, freekv(tokens=160, sinks=16, recent=32), copies=copies, host=host, page_size=16, n_pages=200)
    sequence = runner.new_sequence()
    logits_V = runner.prefill(sequence, prompt_of(90))
    tokens, used = [], []
    assert isinstance(runner.tiers, StreamedRecall)
    for step in range(n_new):
        tokens.append(int(logits_V.argmax()) if step % 3 else step % VOCABULARY)
        (logits_V,) = runner.decode([sequence], tokens[-1:])
        if step % 500 == 499:
            used.append(runner.tiers.used_bytes | {"resident": resident_anonymous_bytes()})
            check_integrity(runner, sequence)
    sequence.release()
    check_integrity(runner)
    runner.tiers.close()
    return tokens, used, runner


def resident_anonymous_bytes() -> int:
    """Memory of this process that is no file's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux' /proc")
@pytest.mark.parametrize("n_new", [1500, pytest.param(10_000, marks=pytest.mark.slow)])
def test_long_generations_stay_in_their_memory_and_are_those_of_the_synchronous_run(n_new: int, tmp_path: Path) -> None:
    """At a fixed budget the device holds as much after thousands of tokens as after a few hundred, and nothing else grows."""
    expected, _, _ = long_generation(SynchronousCopies(), tmp_path, n_new)
    tokens, used, runner = long_generation(ThreadedCopies(), tmp_path, n_new)
    assert tokens == expected
    assert len({bytes_of["device"] for bytes_of in used}) == 1
    assert used[-1]["host"] > used[0]["host"]
    summaries = used[-1]["summaries"] - used[0]["summaries"]
    assert used[-1]["resident"] - used[0]["resident"] < summaries + 8 * 2**20
    assert isinstance(runner.tiers, StreamedRecall)
    assert runner.tiers.statistics.layer_steps_L.tolist() == [n_new, n_new]
    assert list(tmp_path.iterdir()) == []
