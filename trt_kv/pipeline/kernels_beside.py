"""Compilation of the kernels that a new engine will need, in a process beside its build."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence

from trt_kv.pipeline.callbacks import OnProgress
from trt_kv.pipeline.requests import BuildRequest

STAGE = "compiling kernels (once per machine)"
_N_LAYERS = 4
"""More than any preset exempts from its policy."""


@contextlib.contextmanager
def kernels_beside(request: BuildRequest, on_progress: OnProgress) -> Iterator[None]:
    """Compile during the block, and wait for the rest at its end; given up if the block raises.

    Nothing is done if the kernels are in numba's cache, if there is no cache, or for an engine that runs on GPUs. Kernels that
    cannot be compiled are compiled, or fail, when the engine is loaded.
    """
    command = _command(request)
    if command is None:
        yield
        return
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield
        on_progress(STAGE, 0, 1)
        process.wait()
        on_progress(STAGE, 1, 1)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _command(request: BuildRequest) -> Sequence[str] | None:
    """What compiles the kernels of ``request``'s engine; None if nothing has to be compiled."""
    target, kv_dtype = request.target, request.target.kv_dtype or "float32"
    if target.target != "onnxruntime" or target.dtype not in (None, "float32"):
        return None
    from trt_kv.program import PHASES, program_of
    from trt_kv.runtime.backends.host import kernels_ahead

    programs = [
        program_of(request.policy, phase=phase, n_layers=_N_LAYERS, scale=1.0, page_size=target.page_size) for phase in PHASES
    ]
    ops = sorted({node.op for program in programs for nodes in program for node in nodes})
    if request.weights.quantization is not None:
        ops.append(kernels_ahead.NATIVE)
    marker = kernels_ahead.marker_of(kv_dtype, ops)
    if marker is None or marker.exists():
        return None
    return [sys.executable, "-m", kernels_ahead.__name__, kv_dtype, *ops]
