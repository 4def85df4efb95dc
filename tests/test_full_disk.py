"""A disk that fills up under the host tier: the request that needs more than there is ends, and nobody else."""

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from tests.engines import random_ids
from tests.serving import assert_idle, engine_under, prompts_of, small_policy
from trt_kv.errors import CapacityError, RecallError
from trt_kv.runtime.backends.host.recall.driver import StreamedRecall
from trt_kv.runtime.backends.host.recall.store import FileTier, host_tier_at
from trt_kv.runtime.engine import Engine

SHORT, LONG = (37, 16, 28), 120


class Disk:
    """A disk with room for ``n_bytes`` of a tier. With ``promises`` False it cannot say in advance what it has room for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, n_bytes: int, *, promises: bool) -> None:
        self.n_bytes = n_bytes
        self._promises = promises
        self._write, self._allocate = os.pwritev, os.posix_fallocate
        monkeypatch.setattr(os, "pwritev", self.write)
        monkeypatch.setattr(os, "posix_fallocate", self.allocate)

    def write(self, file_descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if offset + sum(buffer.nbytes for buffer in buffers) > self.n_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(file_descriptor, buffers, offset)

    def allocate(self, file_descriptor: int, offset: int, n_bytes: int) -> None:
        if not self._promises:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self._allocate(file_descriptor, offset, max(1, min(n_bytes, self.n_bytes - offset)))
        if offset + n_bytes > self.n_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def pages_of(engine: Engine) -> FileTier:
    assert isinstance(engine.runner.tiers, StreamedRecall)
    assert isinstance(engine.runner.tiers.host, FileTier)
    return engine.runner.tiers.host


def test_who_needs_more_than_the_disk_has_ends_and_the_others_go_on(
    small_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short ones before it, beside it and after it, whose pages are as new to the disk as its own."""
    with engine_under(small_engine, small_policy("freekv"), host_tier=f"file:{tmp_path}") as engine:
        prompts = prompts_of(engine, SHORT)
        expected = [engine.generate(prompt, max_new_tokens=40) for prompt in prompts]
    with engine_under(small_engine, small_policy("freekv"), host_tier=f"file:{tmp_path}") as engine:
        tier = pages_of(engine)
        Disk(monkeypatch, 150 * tier.page_bytes, promises=True)
        streams = [engine.stream(prompt, max_new_tokens=40) for prompt in prompts]
        said = [next(stream) for stream in streams]
        with pytest.raises(CapacityError, match="the disk of the host tier is full") as caught:
            engine.generate(random_ids(engine, LONG, seed=3), max_new_tokens=5)
        assert "No space left on device" in str(caught.value.got)
        assert os.fstat(tier.file_descriptor).st_size == tier.n_pages * tier.page_bytes
        assert os.fstat(tier.file_descriptor).st_blocks * 512 <= 140 * tier.page_bytes, "its part is given back"
        assert [text + "".join(stream) for text, stream in zip(said, streams, strict=True)] == [one.text for one in expected]
        results = engine.generate_batch([*prompts, random_ids(engine, LONG, seed=3)], max_new_tokens=40)
        assert results[:-1] == expected
        assert isinstance(results[-1].error, CapacityError)
        for _ in range(3):
            assert engine.generate_batch(prompts, max_new_tokens=40) == expected
        assert_idle(engine)


def test_after_a_page_could_not_be_written_the_next_requests_run(
    small_engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a file system that promises nothing the request itself finds out, in the middle."""
    with engine_under(small_engine, small_policy("freekv"), host_tier=f"file:{tmp_path}") as engine:
        prompts = prompts_of(engine, SHORT)
        expected = [engine.generate(prompt, max_new_tokens=20) for prompt in prompts]
        Disk(monkeypatch, 60 * pages_of(engine).page_bytes, promises=False)
        with pytest.raises(RecallError, match="No space left on device"):
            engine.generate(random_ids(engine, LONG, seed=3), max_new_tokens=5)
        for _ in range(3):
            assert [engine.generate(prompt, max_new_tokens=20) for prompt in prompts] == expected
        assert_idle(engine)


def test_a_disk_that_has_room_again_is_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = host_tier_at(f"file:{tmp_path}", n_pages=600, page_size=64, n_kv_heads=3, head_size=16)
    disk = Disk(monkeypatch, 50 * tier.page_bytes, promises=True)
    tier.secure(40)
    with pytest.raises(CapacityError):
        tier.secure(60)
    disk.n_bytes *= 2
    tier.secure(60)
    tier.close()


def test_space_that_a_file_system_did_not_promise_is_never_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Giving back what was not obtained would cut off pages that are in use."""
    refusals = iter([errno.EOPNOTSUPP, errno.ENOSPC])

    def refuse(*_: int) -> None:
        raise OSError(next(refusals), "refused")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    tier = host_tier_at(f"file:{tmp_path}", n_pages=6, page_size=3, n_kv_heads=2, head_size=4)
    assert isinstance(tier, FileTier)
    ones = np.ones((2, 2, 3, 4), np.float32)
    tier.secure(2)
    tier.write(1, ones)
    tier.secure(4)
    back = np.zeros((2, 3, 4), np.float32)
    tier.read_head(1, 1, back)
    assert (back == 1).all()
    tier.close()
