"""The graph segments of an engine, each an ONNX Runtime session."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trt_kv.errors import EngineError
from trt_kv.manifest import AttentionPort, GraphSegment
from trt_kv.runtime.backends.host.segments import SegmentExecutor
from trt_kv.runtime.backends.onnx_runtime import ort
from trt_kv.runtime.memory import memory_error
from trt_kv.runtime.processes import never_destroy_in_forks
from trt_kv.safe_path import safe_join

SESSION_OPTIONS = {
    # Threads wait a few microseconds between two matrix products: less than it takes to put a thread to sleep and wake it.
    "session.intra_op.allow_spinning": "1",
    "session.intra_op.spin_duration_us": "50",
    # Threads left spinning would take cores from the KV kernels and the other segments.
    "session.force_spinning_stop": "1",
}
_SHARED_ARENA = {"session.use_env_allocators": "1"}
"""Scratch memory from one arena: one segment runs at a time, and an arena of its own would keep what its largest step took."""


class OnnxRuntimeExecutor(SegmentExecutor):
    """The segments in ONNX Runtime. See ``DenseExecutor``."""

    def __init__(
        self,
        folder: Path,
        segments: Sequence[GraphSegment],
        ports: Sequence[AttentionPort],
        *,
        n_threads: int = 0,
        on_segment: Callable[[int, int], None] | None = None,
    ) -> None:
        """``folder`` holds the segment files and their weights. ``n_threads`` 0: one per core."""
        _share_arena()
        sessions = []
        for done, segment in enumerate(segments, start=1):
            path = safe_join(folder, segment.file, error=EngineError)
            sessions.append(open_segment(path, n_threads=n_threads, config=SESSION_OPTIONS | _SHARED_ARENA))
            if on_segment is not None:
                on_segment(done, len(segments))
        description = f"ONNX Runtime {ort.__version__}, {sessions[0].get_providers()[0]}"
        super().__init__(folder, segments, ports, sessions, description=description)


@functools.cache
def _share_arena() -> None:
    """Make the arena that sessions with ``_SHARED_ARENA`` use, once in a process."""
    where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(where, ort.OrtArenaCfg({}))


def open_segment(
    path: Path,
    *,
    n_threads: int,
    providers: Sequence[str | tuple[str, Mapping[str, str]]] = ("CPUExecutionProvider",),
    config: Mapping[str, str] = SESSION_OPTIONS,
    weights: Mapping[str, ort.OrtValue] | None = None,
    fix: str = "build the engine again",
) -> ort.InferenceSession:
    """A session for one segment. ``weights``, by initializer name, are used without a copy. ``EngineError`` with ``fix`` if
    ONNX Runtime cannot load the segment.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = n_threads
    for name, value in config.items():
        options.add_session_config_entry(name, value)
    for name, weight in (weights or {}).items():
        options.add_initializer(name, weight)
    options.log_severity_level = 3
    try:
        # With fallback, ONNX Runtime would replace a failing provider by another one and print that to standard output.
        session = ort.InferenceSession(path, options, providers=list(providers), enable_fallback=0)
    except Exception as error:  # ONNX Runtime's exceptions share no base class of their own
        if (no_memory := memory_error(error, f"the segment {path.name}")) is not None:
            raise no_memory from error
        raise EngineError(f"ONNX Runtime cannot load {path}", got=str(error), fix=fix) from error
    never_destroy_in_forks(session)
    return session
