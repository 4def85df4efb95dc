"""The graph segments of an engine on a device: ONNX Runtime on torch tensors, on the stream of the KV kernels."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trt_kv.errors import EngineError, MissingDependencyError, UsageError
from trt_kv.manifest import AttentionPort, GraphSegment
from trt_kv.runtime.backends.cuda.decoder import DeviceAttend
from trt_kv.runtime.backends.host.onnxruntime_segments import SESSION_OPTIONS, open_segment
from trt_kv.runtime.backends.host.segments import shapes_of
from trt_kv.runtime.backends.onnx_runtime import ort
from trt_kv.safe_path import safe_join

CUDA = "CUDAExecutionProvider"
GPU_OPTIONS = {
    # A node without a kernel for GPUs would make every step wait for copies to the host and back.
    "session.disable_cpu_ep_fallback": "1",
    # Weights in an arena take up to twice their size.
    "session.use_device_allocator_for_initializers": "1",
}
_TYPES = {
    "tensor(float)": (torch.float32, 1),
    "tensor(float16)": (torch.float16, 10),
    "tensor(bfloat16)": (torch.bfloat16, 16),
    "tensor(int64)": (torch.int64, 7),
}
"""ONNX Runtime's type names to torch dtypes and ONNX type numbers."""
_NUMBERS = dict(_TYPES.values())

_Values = dict[str, Any]
"""Values passed between segments: tensors, or ``OrtValue`` if the graph lacks a shape, so that ONNX Runtime allocates."""


class OnnxRuntimeDeviceDecoder:
    """Runs segment, attention, segment, attention ... segment on a device. See ``DeviceDecoder``.

    Segments read and write torch tensors without copies. On a GPU they are launched on ``stream`` without waiting: later
    launches on the same stream are ordered after them. Each segment has weights and scratch memory of its own.
    """

    can_be_recorded = False
    """ONNX Runtime allocates and frees memory while it runs, which is not allowed during stream capture."""

    def __init__(
        self,
        folder: Path,
        segments: Sequence[GraphSegment],
        ports: Sequence[AttentionPort],
        *,
        device: str | torch.device,
        stream: torch.cuda.Stream | None = None,
        weights: Mapping[str, Tensor] | None = None,
        n_threads: int = 0,
        on_segment: Callable[[int, int], None] | None = None,
    ) -> None:
        """``folder`` holds the segment files and their weights. ``stream``, on a GPU: the one to run on; None: a new one.

        ``weights`` are tensors on ``device``, by their names in checkpoints. Segments use them without a copy and load only the
        others, so that weights of several segments (tied embeddings) take memory once. ``n_threads``, on the CPU only: 0 is one
        per core. ``on_segment`` is called with (opened, total).

        Raises ``UsageError`` for a device that is neither a CPU nor a GPU, ``MissingDependencyError`` if ONNX Runtime was built
        without CUDA, ``EngineError`` for a segment that it cannot load, or not run on the device as a whole.
        """
        self.device = _existing(torch.device(device))
        self.stream = (stream or torch.cuda.Stream(self.device, priority=-1)) if self.device.type == "cuda" else None
        self._ports = ports
        # Sessions read shared weights for as long as they live.
        self._weights = {name: ort.OrtValue.from_dlpack(tensor.detach()) for name, tensor in (weights or {}).items()}
        sessions = []
        for done, segment in enumerate(segments, start=1):
            sessions.append(self._open(safe_join(folder, segment.file, error=EngineError), n_threads))
            if on_segment is not None:
                on_segment(done, len(segments))
        self.shapes = shapes_of(folder, segments, ports, sessions)
        self._segments = [
            _BoundSegment(session, segment, self.device) for session, segment in zip(sessions, segments, strict=True)
        ]
        self.dtype = self._segments[0].types[ports[0].q]

    @property
    def description(self) -> str:
        return f"ONNX Runtime {ort.__version__}, {self.provider}"

    @property
    def provider(self) -> str:
        """The execution provider of the segments."""
        return CUDA if self.stream is not None else "CPUExecutionProvider"

    def __call__(self, input_ids: Tensor, positions: Tensor, logit_rows: Tensor, attend: DeviceAttend) -> Tensor:
        """See ``DeviceDecoder``. Raises ``UsageError`` on another stream than ``stream``."""
        if self.stream is not None and torch.cuda.current_stream(self.device) != self.stream:
            raise UsageError(
                "segments run on the stream that they were opened for", fix="with torch.cuda.stream(decoder.stream)"
            )
        sizes = {"N": len(input_ids), "R": len(logit_rows)}
        values: _Values = {"input_ids": input_ids, "positions": positions, "logit_rows": logit_rows}
        for layer, segment in enumerate(self._segments):
            values |= segment.run(values, sizes)
            if layer < len(self._ports):
                port = self._ports[layer]
                out = attend(layer, values.pop(port.q), values.pop(port.k), values.pop(port.v))
                values[port.out] = out.contiguous()
        logits: Tensor = values["logits"]
        return logits

    def _open(self, path: Path, n_threads: int) -> ort.InferenceSession:
        if self.stream is None:
            return open_segment(path, n_threads=n_threads, weights=self._weights)
        options = {
            "device_id": str(self.device.index),
            "user_compute_stream": str(self.stream.cuda_stream),
            "do_copy_in_default_stream": "1",
            "arena_extend_strategy": "kSameAsRequested",
            # float32 means float32, as on the host and in torch.
            "use_tf32": "0",
        }
        return open_segment(
            path,
            n_threads=1,  # The host only launches.
            providers=[(CUDA, options)],
            config=SESSION_OPTIONS | GPU_OPTIONS,
            weights=self._weights,
            fix="install the release of CUDA and cuDNN that onnxruntime-gpu was built for; else build the engine again",
        )


class _BoundSegment:
    """One segment, and the I/O binding of its inputs and outputs."""

    def __init__(self, session: ort.InferenceSession, segment: GraphSegment, device: torch.device) -> None:
        outputs = {output.name: output for output in session.get_outputs()}
        self.types = {name: _TYPES[output.type][0] for name, output in outputs.items()}
        self._shapes = {name: outputs[name].shape for name in segment.outputs}
        self._inputs = segment.inputs
        self._device = device
        self._place = (device.type, device.index or 0)
        self._session = session
        self._binding = session.io_binding()
        self._options = ort.RunOptions()
        # Otherwise the host would wait for the device at the end of every segment.
        self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self, values: _Values, sizes: Mapping[str, int]) -> _Values:
        """The outputs, by name. On a GPU they are not computed yet: only later launches on the same stream may read them."""
        for name in self._inputs:
            value = values[name]
            if isinstance(value, Tensor):
                self._binding.bind_input(name, *self._place, _NUMBERS[value.dtype], tuple(value.shape), value.data_ptr())
            else:
                self._binding.bind_ortvalue_input(name, value)
        made: _Values = {}
        for name, axes in self._shapes.items():
            if None in axes:
                self._binding.bind_output(name, *self._place)
                continue
            shape = tuple(sizes.get(axis, axis) for axis in axes)
            tensor = torch.empty(shape, dtype=self.types[name], device=self._device)
            self._binding.bind_output(name, *self._place, _NUMBERS[tensor.dtype], shape, tensor.data_ptr())
            made[name] = tensor
        self._session.run_with_iobinding(self._binding, self._options)
        if len(made) < len(self._shapes):
            allocated = dict(zip(self._shapes, self._binding.get_outputs(), strict=True))
            made |= {name: allocated[name] for name in self._shapes if name not in made}
        return made


def _existing(device: torch.device) -> torch.device:
    """``device`` with its index. ``UsageError`` or ``MissingDependencyError`` if ONNX Runtime cannot run there."""
    if device.type == "cpu":
        return device
    if device.type != "cuda":
        raise UsageError("segments cannot run on this device", got=str(device), expected="cpu or cuda")
    if CUDA not in ort.get_available_providers():
        raise MissingDependencyError(
            "this ONNX Runtime has been built without CUDA",
            got=", ".join(ort.get_available_providers()),
            expected=CUDA,
            fix="pip uninstall --yes onnxruntime && pip install onnxruntime-gpu  (one takes the place of the other)",
        )
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device
