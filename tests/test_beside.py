"""Work beside a block: its result, its error, what it tells, and its end if the block is interrupted."""

import gc
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from trt_kv.beside import beside
from trt_kv.engine_files import verified
from trt_kv.errors import EngineError
from trt_kv.manifest import load_manifest


def test_the_work_runs_during_the_block_and_is_told_of_on_this_thread() -> None:
    told: list[tuple[int, int]] = []
    threads: set[int] = set()
    entered = threading.Event()

    def tell(done: int) -> None:
        told.append((done, threading.get_ident()))

    def work(report: Callable[..., None]) -> str:
        entered.wait(30)
        threads.add(threading.get_ident())
        report(1)
        report(2)
        return "done"

    with beside(work, tell) as job:
        entered.set()
        assert job.result() == "done"
    assert told == [(1, threading.get_ident()), (2, threading.get_ident())]
    assert threading.get_ident() not in threads


def test_a_result_lives_no_longer_than_its_user() -> None:
    class Result:
        pass

    gc.disable()
    try:
        with beside(lambda _: Result(), print) as job:
            ended = weakref.ref(job.result())
        assert ended() is None
    finally:
        gc.enable()


def test_an_error_of_the_work_is_that_of_its_result() -> None:
    def work(_: Callable[..., None]) -> None:
        raise EngineError("broken")

    with pytest.raises(EngineError, match="broken"), beside(work, print) as job:
        job.result()


def test_an_interrupted_block_ends_the_work() -> None:
    n_reports = 0

    def work(report: Callable[..., None]) -> None:
        nonlocal n_reports
        while True:
            report(n_reports)
            n_reports += 1

    with pytest.raises(KeyboardInterrupt), beside(work, print):
        raise KeyboardInterrupt
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("beside")]


@pytest.mark.parametrize("fails", [False, True])
def test_weights_are_verified_when_the_block_ends(fails: bool, broken: Path) -> None:
    """Whatever the block made of them."""
    path = broken / "graphs" / "weights.data"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    reached = []

    def load() -> None:
        with verified(broken, load_manifest(broken), print):
            reached.append(True)
            if fails:
                raise EngineError("cannot be loaded")

    with pytest.raises(EngineError, match=r"weights\.data is not the file"):
        load()
    assert reached


def test_what_is_parsed_is_verified_before_the_block(broken: Path) -> None:
    path = broken / "graphs" / "segment_00.onnx"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(EngineError, match="segment_00"), verified(broken, load_manifest(broken), print):
        raise AssertionError("the block was entered")


def test_every_byte_is_told_of(small_folder: Path) -> None:
    told: list[tuple[int, int]] = []
    with verified(small_folder, load_manifest(small_folder), lambda *progress: told.append(progress)):
        pass
    assert told == sorted(told)
    assert told[-1][0] == told[-1][1] == told[0][1]
