"""Which pages are where, and when they were moved, never shows in a result."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.speed.synchronous_copies import SynchronousCopies
from tests.recall_rig import RandomModel, StepwiseCopies, check_integrity, freekv, generate, prompt_of, runner_of
from trt_kv.plugins.paging import Floats, Ints
from trt_kv.plugins.recall_attention.page_counts import PageLimits
from trt_kv.policies import policy_from_name
from trt_kv.runtime.backends.host.recall import prompt_attention
from trt_kv.runtime.backends.host.recall.background import ThreadedCopies
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.layer import Choice, LayerStreams
from trt_kv.runtime.backends.host.recall.store import host_tier_at
from trt_kv.runtime.backends.host.recall.working_set import HEAD, PAGE, SLOT, WAITS, moves_to

pytestmark = pytest.mark.slow

N_NEW = 40

SETTINGS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "tokens": st.integers(16, 60),
        "sinks": st.integers(0, 7),
        "recent": st.integers(1, 9),
        "tau": st.sampled_from([-1.01, 0.0, 0.5, 0.7, 0.9, 1.0, 1.01]),
        "page_summary": st.sampled_from(["minmax", "deviation", "codes"]),
        "group_pooling": st.sampled_from(["mean_softmax", "max_softmax", "mean_raw", "max_raw"]),
        "exempt_layers": st.sampled_from([(), (0,), (1,)]),
    }
)
MODELS = st.builds(
    RandomModel,
    seed=st.integers(0, 5),
    n_heads=st.just(4),
    n_kv_heads=st.sampled_from([1, 2, 4]),
    head_size=st.sampled_from([3, 6]),
    steadiness=st.sampled_from([0.2, 0.7, 0.95]),
)


@given(
    model=MODELS,
    settings=SETTINGS,
    n_prompt=st.integers(1, 90),
    page_size=st.integers(1, 7),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    eagerness=st.sampled_from([0.0, 0.3, 0.8, 0.97, 1.0]),
)
def test_streamed_is_the_op_bit_for_bit_in_any_order(
    model: RandomModel, settings: dict[str, Any], n_prompt: int, page_size: int, chunk: int, seed: int, eagerness: float
) -> None:
    """Any model, prompt, budget, tau, page size and chunk; copies delayed, reordered and interleaved at will."""
    policy = freekv(**{name: value for name, value in settings.items() if name != "softmax_scale"})
    prompt = prompt_of(n_prompt, seed=seed)
    expected, *others = (
        generate(runner_of(model, policy, copies=copies, page_size=page_size, chunk=chunk), prompt, N_NEW)
        for copies in (None, StepwiseCopies(seed, eagerness=eagerness), SynchronousCopies())
    )
    assert np.isfinite(expected).all()
    for got in others:
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("where", ["ram", "mmap"])
def test_threads_and_files_change_nothing(where: str, tmp_path: Any) -> None:
    model, policy = RandomModel(steadiness=0.8), freekv()
    expected = generate(runner_of(model, policy), prompt_of(70), 100)
    sizes: dict[str, Any] = {"n_pages": 600, "page_size": 4, "n_kv_heads": model.n_kv_heads, "head_size": model.head_size}
    host = host_tier_at(where if where == "ram" else f"file:{tmp_path}", **sizes)
    copies = ThreadedCopies()
    runner = runner_of(model, policy, copies=copies, host=host)
    np.testing.assert_array_equal(generate(runner, prompt_of(70), 100), expected)
    assert isinstance(runner.tiers, StreamedRecall)
    runner.tiers.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("budget", ["uniform", "pyramid", "unimetric"])
def test_working_sets_may_differ_by_layer_and_input(budget: str) -> None:
    """A budget per layer, as from a recipe, and one that is found from the prompt (ReFreeKV's Uni-Metric)."""
    settings: dict[str, Any] = {"budget": budget, "sinks": 3, "recent": 5, "tau": 0.6}
    settings |= {"threshold": 0.2} if budget == "unimetric" else {"kept": 0.4}
    policy, model = freekv(**settings), RandomModel()
    expected = generate(runner_of(model, policy), prompt_of(90), N_NEW)
    np.testing.assert_array_equal(
        generate(runner_of(model, policy, copies=SynchronousCopies()), prompt_of(90), N_NEW), expected
    )
    runner = runner_of(model, policy, copies=StepwiseCopies(1))
    np.testing.assert_array_equal(generate(runner, prompt_of(90), N_NEW), expected)
    sequence = runner.new_sequence()
    runner.prefill(sequence, prompt_of(90))
    runner.decode([sequence], [1])
    assert (len(set(sequence.held_tokens.tolist())) > 1) == (budget != "uniform")
    assert (sequence.adaptive_budget >= 0).all() == (budget == "unimetric")
    assert sequence.held_tokens.max() < 90 + 1
    sequence.release()


def test_every_sequence_of_a_batch_is_as_alone() -> None:
    """Ragged prompts that start and end at different times, decoded together by the op and by streams."""
    model, policy = RandomModel(), freekv()
    logits: list[list[np.ndarray]] = [[], []]
    for out, copies in zip(logits, (None, StepwiseCopies(5)), strict=True):
        runner = runner_of(model, policy, copies=copies)
        sequences = [runner.new_sequence() for _ in range(3)]
        for sequence, n_prompt in zip(sequences, (33, 5, 80), strict=True):
            out.append(runner.prefill(sequence, prompt_of(n_prompt, seed=n_prompt)))
        for step in range(30):
            running = sequences if step < 15 else sequences[1:]
            if step == 15:
                sequences[0].release()
            out.extend(runner.decode(running, [step % 7, step % 5, step % 3][: len(running)]))
        for sequence in sequences:
            sequence.release()
        check_integrity(runner)
    for expected, got in zip(*logits, strict=True):
        np.testing.assert_array_equal(got, expected)


def test_a_budget_of_the_whole_context_is_full_attention() -> None:
    model = RandomModel()
    full = generate(runner_of(model, policy_from_name("full")), prompt_of(60), N_NEW)
    policy = freekv(tokens=60 + N_NEW + 8)
    np.testing.assert_array_equal(generate(runner_of(model, policy), prompt_of(60), N_NEW), full)
    np.testing.assert_array_equal(generate(runner_of(model, policy, copies=StepwiseCopies(2)), prompt_of(60), N_NEW), full)
    small = generate(runner_of(model, freekv(), copies=StepwiseCopies(2)), prompt_of(60), N_NEW)
    assert not np.array_equal(small, full)


def test_a_prompt_is_read_block_by_block_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks only change the order of sums; memory beside the cache is that of one block."""
    model, policy = RandomModel(), freekv()
    expected = generate(runner_of(model, policy, copies=StepwiseCopies()), prompt_of(100), 1)
    monkeypatch.setattr(prompt_attention, "BLOCK_TOKENS", 8)
    sizes: list[int] = []
    runner = runner_of(model, policy, copies=StepwiseCopies(), chunk=16)
    assert isinstance(runner.tiers, StreamedRecall)
    read = runner.tiers.host.read_pages

    def read_and_count(pages: list[int]) -> Floats:
        sizes.append(len(pages))
        return read(pages)

    monkeypatch.setattr(runner.tiers.host, "read_pages", read_and_count)
    np.testing.assert_allclose(generate(runner, prompt_of(100), 1), expected, atol=1e-5)
    assert max(sizes) == 8 // 4


def test_only_missing_pages_move() -> None:
    """With queries that hardly turn, adjacent steps want nearly the same pages, and these stay where they are."""
    moved = {}
    for steadiness in (0.0, 0.999):
        runner = runner_of(RandomModel(steadiness=steadiness), freekv(tau=-1.01), copies=StepwiseCopies())
        generate(runner, prompt_of(90), N_NEW)
        assert isinstance(runner.tiers, StreamedRecall)
        counts = runner.tiers.statistics
        assert counts.moved_at_once_L.sum() == 0
        assert counts.corrected_LK.sum() == 0
        moved[steadiness] = int(counts.moved_ahead_L.sum())
    n_chosen = 24 // 4 - 1 - 2
    assert moved[0.999] < moved[0.0] < (N_NEW - 1) * 3 * 2 * n_chosen


def test_a_query_ranks_pages_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where every KV head is corrected, the next step is given what was chosen, but for steps that have another page."""
    asked: list[int] = []
    choose = LayerStreams._choose

    def counted(streams: LayerStreams, query_HD: Floats, choice: Choice, n_tokens: int) -> Ints:
        asked.append(n_tokens)
        return choose(streams, query_HD, choice, n_tokens)

    monkeypatch.setattr(LayerStreams, "_choose", counted)
    runner = runner_of(RandomModel(steadiness=0.0), freekv(tau=0.99), copies=StepwiseCopies())
    generate(runner, prompt_of(90), N_NEW)
    assert isinstance(runner.tiers, StreamedRecall)
    counts = runner.tiers.statistics
    assert counts.head_rate == 1.0
    n_steps = int(counts.layer_steps_L[0])
    limits = PageLimits(page_size=4, sinks=3, recent=5)
    n_grown = sum(limits.choosable(n + 1) != limits.choosable(n) for n in range(91, 91 + n_steps))
    assert 0 < n_grown < n_steps
    after_prompt = 1
    assert len(asked) == len(counts.layer_steps_L) * (after_prompt + n_steps + n_grown)


def test_what_is_counted_is_what_happened() -> None:
    runner = runner_of(RandomModel(), freekv(tau=1.01), copies=StepwiseCopies())
    generate(runner, prompt_of(90), 11)
    assert isinstance(runner.tiers, StreamedRecall)
    counts = runner.tiers.statistics
    assert counts.layer_steps_L.tolist() == [10, 10, 10]
    assert counts.head_rate == counts.layer_step_rate == 1.0
    assert counts.moved_ahead_L.sum() == 0
    assert counts.moved_bytes == counts.moved_at_once_L.sum() * 2 * 4 * 6 * 4
    assert counts.pages_written == 3 * (90 + 10) // 4
    counts.reset()
    assert counts.to_json()["moved_bytes"] == counts.pages_written == 0


def test_the_device_holds_the_budget_and_the_host_everything() -> None:
    """Exactly: pages of both tiers and summaries, however long the context grows."""
    model, policy = RandomModel(), freekv(tokens=32, sinks=4, recent=8)
    runner = runner_of(model, policy, copies=StepwiseCopies())
    assert isinstance(runner.tiers, StreamedRecall)
    sequence = runner.new_sequence()
    runner.prefill(sequence, prompt_of(150))
    runner.decode([sequence], [1])
    n_sinks, n_newest, n_chosen, n_staging = 1, 3, 4, 1
    page_bytes = runner.pool.page_bytes
    device_bytes = 3 * (n_sinks + n_newest + n_chosen + n_staging) * page_bytes
    for n_tokens in range(152, 250):
        used = runner.tiers.used_bytes
        assert used["device"] == device_bytes == runner.pool.used_bytes
        n_pages = 3 * -(-(n_tokens - 1) // 4)
        assert used["host"] == n_pages * 2 * 2 * 4 * 6 * 4
        assert used["summaries"] == n_pages * 2 * 2 * 6 * 4
        runner.decode([sequence], [n_tokens % 7])
    sequence.release()
    assert sum(runner.tiers.used_bytes.values()) == 0


@given(n_before=st.integers(0, 20), page_size=st.integers(1, 6), seed=st.integers(0, 1000))
def test_a_fork_goes_on_as_its_original_and_alone(n_before: int, page_size: int, seed: int) -> None:
    """Pages of both tiers, what was recalled and the remembered queries are copied; then neither notices the other."""
    model, policy = RandomModel(), freekv(exempt_layers=(1,))
    runs = []
    for copies in (None, StepwiseCopies(seed)):
        runner = runner_of(model, policy, copies=copies, page_size=page_size)
        one = runner.new_sequence()
        runner.prefill(one, prompt_of(50))
        for step in range(n_before):
            runner.decode([one], [step % 7])
        two = one.fork()
        assert set(one.pages).isdisjoint(two.pages)
        logits = [runner.decode([one, two], [step % 5, step % 3]) for step in range(15)]
        one.release()
        logits += [runner.decode([two], [step % 4]) for step in range(15)]
        two.release()
        check_integrity(runner)
        runs.append(logits)
    for expected, got in zip(*runs, strict=True):
        np.testing.assert_array_equal(got, expected)


@given(data=st.data())
def test_moves_bring_what_is_missing_into_slots_that_nobody_needs(data: st.DataObject) -> None:
    """Against sets in plain Python."""
    n_wanted = data.draw(st.integers(0, 6))
    n_slots = n_wanted + data.draw(st.integers(0, 3))
    wanted, attended = (
        np.sort([data.draw(st.permutations(range(12)))[:n] for _ in range(2)], axis=1).astype(np.int64).reshape(2, n)
        for n in (n_wanted, data.draw(st.integers(0, n_slots)))
    )
    held = np.array([data.draw(st.permutations(range(-1, 12)))[:n_slots] for _ in range(2)], np.int64).reshape(2, n_slots)
    moves = moves_to(wanted, held, attended, [0, 1])
    assert moves[:, WAITS].tolist() == sorted(moves[:, WAITS].tolist())
    for head in (0, 1):
        own = moves[moves[:, HEAD] == head]
        missing = [page for page in wanted[head] if page not in held[head]]
        free = [slot for slot in range(n_slots) if held[head, slot] not in wanted[head]]
        unread = [slot for slot in free if held[head, slot] not in attended[head]]
        assert own[:, PAGE].tolist() == missing
        assert own[:, SLOT].tolist() == [*unread, *(slot for slot in free if slot not in unread)][: len(missing)]
        assert own[:, WAITS].tolist() == [slot not in unread for slot in own[:, SLOT]]
