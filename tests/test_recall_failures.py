"""A copy that fails, a full disk, a truncated file: one request ends with a clear error, and the others are not affected."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.speed.synchronous_copies import SynchronousCopies
from tests.recall_rig import RandomModel, StepwiseCopies, check_integrity, freekv, generate, prompt_of, runner_of
from trt_kv.errors import CapacityError, RecallError, TrtKvError, UsageError
from trt_kv.runtime.backends.host.recall.background import Copies, ThreadedCopies, lost_pages
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.store import FileTier, HostTier, host_tier_at
from trt_kv.runtime.cache.sequence import SequenceCache
from trt_kv.runtime.model_runner import ModelRunner

MODEL = RandomModel()
POLICY = freekv()
PAGE_SIZE = 4


def file_tier(path: Path, n_pages: int = 600) -> FileTier:
    tier = host_tier_at(
        f"file:{path}", n_pages=n_pages, page_size=PAGE_SIZE, n_kv_heads=MODEL.n_kv_heads, head_size=MODEL.head_size
    )
    assert isinstance(tier, FileTier)
    return tier


@given(fail_at=st.integers(1, 900), seed=st.integers(0, 1000), eagerness=st.sampled_from([0.0, 0.5, 1.0]))
def test_a_failed_copy_raises_at_the_join_and_loses_no_page(fail_at: int, seed: int, eagerness: float) -> None:
    """Whichever copy of a generation it is: an error or, where the copy never came, the right result. Then all goes on."""
    copies = StepwiseCopies(seed, eagerness=eagerness, fail_at=fail_at)
    runner = runner_of(MODEL, POLICY, copies=copies)
    sequence = runner.new_sequence()
    logits: list[np.ndarray] = []
    failure = failure_of(lambda: generate_into(logits, runner, sequence))
    assert (failure is None) == (copies.n_steps < fail_at)
    assert failure is None or "the test made this copy fail" in str(failure)
    assert sequence.failure is failure
    sequence.release()
    check_integrity(runner)
    copies.fail_at = None
    expected = generate(runner_of(MODEL, POLICY), prompt_of(50), 16)
    np.testing.assert_array_equal(generate(runner, prompt_of(50), 16), expected)
    for got, right in zip(logits, expected, strict=False):
        np.testing.assert_array_equal(got, right)


def generate_into(logits: list[np.ndarray], runner: ModelRunner, sequence: SequenceCache) -> None:
    logits.append(runner.prefill(sequence, prompt_of(50)))
    while len(logits) < 16:
        logits.append(runner.decode([sequence], [int(logits[-1].argmax())])[0])


def failure_of(work: Callable[[], object]) -> RecallError | None:
    """What ``work`` raises, if it is that pages were lost."""
    try:
        work()
    except RecallError as error:
        return error
    return None


def decode_both(runner: ModelRunner, n_new: int, spoil: list[int]) -> tuple[list[np.ndarray], list[TrtKvError | None]]:
    """Two sequences decode together; the host pages of the first are in ``spoil`` once its prompt was read."""
    sequences = [runner.new_sequence(), runner.new_sequence()]
    logits = [runner.prefill(sequence, prompt_of(60, seed=seed)) for seed, sequence in enumerate(sequences)]
    assert isinstance(runner.tiers, StreamedRecall)
    spoil += sequences[0].pages_in(runner.tiers.host)
    seen = []
    for step in range(n_new):
        logits = list(runner._decode_step(sequences, [step % 7, step % 5]))
        seen.append(logits[1])
    failures = [sequence.failure for sequence in sequences]
    for sequence in sequences:
        sequence.release()
    check_integrity(runner)
    return seen, failures


@pytest.mark.parametrize("copies", [SynchronousCopies, ThreadedCopies, StepwiseCopies])
def test_the_other_sequences_of_a_batch_go_on(copies: type[Copies], monkeypatch: pytest.MonkeyPatch) -> None:
    expected, failures = decode_both(runner_of(MODEL, POLICY, copies=SynchronousCopies()), 20, [])
    assert failures == [None, None]
    runner = runner_of(MODEL, POLICY, copies=copies())
    assert isinstance(runner.tiers, StreamedRecall)
    host = runner.tiers.host
    read, bad = host.read_head, list[int]()

    def read_or_fail(page: int, head: int, into_2PD: np.ndarray) -> None:
        if page in bad:
            raise OSError("this page is gone")
        read(page, head, into_2PD)

    monkeypatch.setattr(host, "read_head", read_or_fail)
    got, failures = decode_both(runner, 20, bad)
    assert "this page is gone" in str(failures[0])
    assert failures[1] is None
    np.testing.assert_array_equal(got, expected)
    runner.tiers.close()


def test_a_sequence_that_failed_raises_unless_it_may_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(MODEL, POLICY, copies=StepwiseCopies(fail_at=200))
    sequence = runner.new_sequence()
    runner.prefill(sequence, prompt_of(60))
    failure = failure_of(lambda: decode_steps(runner, sequence, 100))
    assert "others are not" in str(failure)
    assert sequence.failure is failure
    with pytest.raises(RecallError):
        runner.decode([sequence], [1])


def decode_steps(runner: ModelRunner, sequence: SequenceCache, n_steps: int) -> None:
    for step in range(n_steps):
        runner.decode([sequence], [step % 7])


@pytest.mark.parametrize("copies", [SynchronousCopies, ThreadedCopies])
def test_a_truncated_file_is_an_error_and_not_a_signal(copies: type[Copies], tmp_path: Path) -> None:
    """A mapped file would kill the process here."""
    tier = file_tier(tmp_path)
    runner = runner_of(MODEL, POLICY, copies=copies(), host=tier)
    sequence = runner.new_sequence()
    runner.prefill(sequence, prompt_of(60))
    runner.decode([sequence], [1])
    os.ftruncate(tier.file_descriptor, 100)
    with pytest.raises(RecallError, match="ends at byte"):
        decode_steps(runner, sequence, 50)
    sequence.release()
    check_integrity(runner)


def test_a_prompt_whose_earlier_pages_are_gone_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = file_tier(tmp_path)
    runner = runner_of(MODEL, POLICY, copies=SynchronousCopies(), host=tier)
    sequence = runner.new_sequence()

    read_chunk = runner._read_chunk

    def cut_behind_48(*arguments: Any, **options: Any) -> np.ndarray:
        """Behind the hole that a later page would leave, zeros would be read as if they were keys."""
        logits = read_chunk(*arguments, **options)
        if sequence.num_computed_tokens == 48:
            os.ftruncate(tier.file_descriptor, 0)
        return logits

    monkeypatch.setattr(runner, "_read_chunk", cut_behind_48)
    with pytest.raises(RecallError, match="was truncated"):
        runner.prefill(sequence, prompt_of(60))
    sequence.release()
    check_integrity(runner)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
@pytest.mark.parametrize("copies", [SynchronousCopies, ThreadedCopies])
def test_a_full_disk_is_an_error_of_the_request_that_fills_it(
    copies: type[Copies], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = file_tier(tmp_path)
    monkeypatch.setattr(tier, "_check_whole", lambda: None)  # the device that is always full says that it is empty, too
    runner = runner_of(MODEL, POLICY, copies=copies(), host=tier)
    full = os.open("/dev/full", os.O_RDWR)
    os.dup2(full, tier.file_descriptor)
    os.close(full)
    sequence = runner.new_sequence()
    with pytest.raises(RecallError, match="No space left on device"):
        runner.prefill(sequence, prompt_of(60))
    sequence.release()
    check_integrity(runner)


@pytest.mark.parametrize("where", ["disk", "mmap", "mmap:", "RAM", ""])
def test_a_place_that_is_none_is_refused(where: str) -> None:
    with pytest.raises(UsageError, match="unknown host tier"):
        host_tier_at(where, n_pages=1, page_size=1, n_kv_heads=1, head_size=1)


def test_an_existing_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "precious"
    path.write_text("data")
    with pytest.raises(UsageError, match="nothing was overwritten"):
        file_tier(path)
    assert path.read_text() == "data"
    with pytest.raises(UsageError, match="No such file"):
        file_tier(tmp_path / "missing" / "kv")


def test_a_tier_larger_than_the_file_system_allows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CapacityError, match="cannot hold the host tier"):
        host_tier_at(f"file:{tmp_path}", n_pages=4, page_size=2**54, n_kv_heads=2, head_size=6)
    assert list(tmp_path.iterdir()) == []


def test_the_file_has_no_name_while_it_is_used_and_is_gone_afterwards(tmp_path: Path) -> None:
    tier = file_tier(tmp_path / "kv")
    assert list(tmp_path.iterdir()) == []
    tier.write(3, np.ones(tier.page_shape, np.float32))
    into = np.zeros((2, PAGE_SIZE, MODEL.head_size), np.float32)
    tier.read_head(3, 1, into)
    assert (into == 1).all()
    assert os.fstat(tier.file_descriptor).st_size == 600 * tier.page_bytes
    descriptor = tier.file_descriptor
    tier.close()
    tier.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def tiers(tmp_path: Path) -> list[HostTier]:
    sizes: dict[str, Any] = {"n_pages": 9, "page_size": 3, "n_kv_heads": 2, "head_size": 5}
    return [host_tier_at("ram", **sizes), host_tier_at(f"file:{tmp_path}", **sizes)]


def test_both_tiers_give_back_what_was_stored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for tier in tiers(tmp_path):
        pages = {page: rng.standard_normal(tier.page_shape, np.float32) for page in (7, 0, 8, 3)}
        for page, content in pages.items():
            tier.write(page, content)
        np.testing.assert_array_equal(tier.read_pages([0, 8, 7]), np.stack([pages[0], pages[8], pages[7]]))
        device = np.zeros((4, *tier.page_shape), np.float32)
        tier.read_head(8, 1, device[2, :, 1])
        np.testing.assert_array_equal(device[2, :, 1], pages[8][:, 1])
        assert device.sum() == pytest.approx(pages[8][:, 1].sum(), abs=1e-5)


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "free space on the disk"), (errno.EDQUOT, "free space"), (errno.EIO, "check the host")],
)
def test_the_advice_after_a_full_disk_is_about_the_disk(number: int, advice: str) -> None:
    fix = str(lost_pages("lost", OSError(number, os.strerror(number))).fix)
    assert advice in fix
    assert "--host-tier file:PATH" in fix
    assert "memory" not in fix
