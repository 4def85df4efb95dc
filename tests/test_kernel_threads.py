"""Threads that OpenMP keeps for a thread of ours end with its work, and have a processor each meanwhile."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from trt_kv.runtime.kernel_threads import release_kernel_threads

_PROGRAM = """
import asyncio, os, sys, threading
from trt_kv.runtime.async_engine import AsyncEngine
from trt_kv.runtime.engine import Engine
from trt_kv.runtime import kernel_threads

def n_kept():  # threads of the process besides those of Python
    return len(os.listdir("/proc/self/task")) - len(threading.enumerate())

engine = Engine.load(sys.argv[1])
if kernel_threads._openmp() is None:
    print("no GNU OpenMP"); sys.exit()
before = n_kept()
engine.generate("the old man", max_new_tokens=2)
assert n_kept() == before, "after generate"
stream = engine.stream("the old man", max_new_tokens=4, ignore_eos=True)
next(stream)
assert n_kept() > before, "between the tokens of a stream"
list(stream)
assert n_kept() == before, "after a stream"

async def main():
    server = AsyncEngine(engine)
    await server.generate("the old man", max_new_tokens=2)
    for _ in range(100):
        if n_kept() == before:
            break
        await asyncio.sleep(0.05)
    assert n_kept() == before, "after the last request"
    await server.close()

asyncio.run(main())
print("released")
"""

_BINDING = """
import os, threading, numba
from trt_kv.runtime.kernel_threads import _tell_ids, kernel_threads_bound, release_kernel_threads, np

cpus = os.sched_getaffinity(0)
for _ in range(3):
    ids = np.zeros(numba.get_num_threads(), np.int64)
    _tell_ids(ids)  # loads OpenMP
    with kernel_threads_bound():
        _tell_ids(ids)
        used = [os.sched_getaffinity(int(number)) for number in ids]
        assert all(len(some) == 1 for some in used), used
        assert set().union(*used) == cpus, used
        assert os.sched_getaffinity(0) in used and threading.get_native_id() in ids
    assert os.sched_getaffinity(0) == cpus
    release_kernel_threads()
numba.set_num_threads(1)
with kernel_threads_bound():
    assert os.sched_getaffinity(0) == cpus, "fewer threads than processors are left alone"
print("bound")
"""


def run(program: str, *arguments: str, n_threads: int = 2) -> str:
    environment = os.environ | {"NUMBA_NUM_THREADS": str(n_threads), "NUMBA_THREADING_LAYER": "omp"}
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux tells them")
def test_threads_end_with_the_work_of_a_thread(small_folder: Path) -> None:
    told = run(_PROGRAM, str(small_folder))
    if "no GNU OpenMP" in told:
        pytest.skip("kernels do not run on GNU's OpenMP")
    assert "released" in told


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="binds threads to several processors")
def test_each_thread_has_a_processor(small_folder: Path) -> None:
    if "no GNU OpenMP" in run(_PROGRAM, str(small_folder)):
        pytest.skip("kernels do not run on GNU's OpenMP")
    assert "bound" in run(_BINDING, n_threads=len(os.sched_getaffinity(0)))


def test_nothing_to_release() -> None:
    release_kernel_threads()
    release_kernel_threads()
