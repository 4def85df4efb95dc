"""Threads that OpenMP keeps for a thread of ours end with its work, so that another one's kernels may wait awake."""

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


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux tells them")
def test_threads_end_with_the_work_of_a_thread(small_folder: Path) -> None:
    environment = os.environ | {"NUMBA_NUM_THREADS": "2", "NUMBA_THREADING_LAYER": "omp"}
    command = [sys.executable, "-c", _PROGRAM, str(small_folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    if "no GNU OpenMP" in done.stdout:
        pytest.skip("kernels do not run on GNU's OpenMP")
    assert "released" in done.stdout


def test_nothing_to_release() -> None:
    release_kernel_threads()
    release_kernel_threads()
