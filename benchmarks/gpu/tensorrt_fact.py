"""``python -m benchmarks.gpu.tensorrt_fact NAME FILE PLANS``: determines one fact for ``benchmarks.gpu.tensorrt_facts``.

It runs in its own process, because TensorRT may crash and CUDA errors are permanent within a process. The result is written to
FILE; TensorRT's log and tracebacks are printed, so that they survive a crash. PLANS: the folder of the plans.
"""

import ctypes
import functools
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.tensorrt_examples import Arrays, Attention, Example, Plain, RefusedError, find_tensorrt, logger_of, plan_of

Launch = Callable[[int], None]
"""Launches the work on the stream with this address; raises ``RefusedError`` if TensorRT refuses."""

PACKAGES = (
    *("numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxruntime-ep-nv-tensorrt-rtx-cu13"),
    *("tensorrt", "tensorrt-cu13-bindings", "tensorrt-rtx", "torch", "triton"),
)


def is_built(plans: Path, *, example: Callable[[], Example]) -> str:
    """Build the example's plan into the folder."""
    made = example()
    plan = plan_of(made)
    partial = plans / f"{made.name}.{os.getpid()}"
    partial.write_bytes(plan)
    partial.rename(plans / f"{made.name}.plan")
    return f"{len(plan)} bytes"


@dataclass(frozen=True, kw_only=True)
class Bound:
    """An example's tensors in memory: torch tensors by name, and the addresses that the engine gets for them."""

    example: Example
    tensors: Mapping[str, Any]
    addresses: Mapping[str, int]

    def fill(self, inputs: Arrays) -> None:
        """Fill the inputs with these values, and the outputs with values that cannot be mistaken for a result."""
        import torch

        for name, tensor in self.tensors.items():
            if name in inputs:
                tensor.copy_(torch.from_numpy(inputs[name]))
            else:
                tensor.fill_(float("nan") if tensor.is_floating_point() else -1)

    def check(self, inputs: Arrays) -> float:
        """The largest difference from the results expected for ``inputs``; ``RefusedError`` if it is too large or NaN."""
        worst = 0.0
        for name, values in self.example.expected(inputs).items():
            got = self.tensors[self.example.in_place.get(name, name)].cpu().numpy()
            known = ~np.isnan(values) if values.dtype.kind == "f" else np.ones(values.shape, bool)
            error = float(np.abs(got[known].astype(np.float64) - values[known]).max(initial=0.0))
            if not error <= self.example.within:
                raise RefusedError(f"it ran, and {name!r} is wrong by {error}")
            worst = max(worst, error)
        return worst


def bound(example: Example, *, pinned: frozenset[str] = frozenset(), alias: bool = False) -> Bound:
    """Tensors for an example; those in ``pinned`` are in pinned host memory. ``alias``: pass their device addresses."""
    import torch

    types = {name: array.dtype for name, array in {**example.expected(example.inputs(0)), **example.inputs(0)}.items()}
    shapes = {name: array.shape for name, array in example.inputs(0).items()} | dict(example.outputs)
    tensors = {}
    for name, shape in shapes.items():
        empty = torch.from_numpy(np.zeros(shape, types[name]))
        tensors[name] = empty.pin_memory() if name in pinned else empty.cuda()
    addresses = {name: int(tensor.data_ptr()) for name, tensor in tensors.items()}
    for name in pinned if alias else ():
        address = ctypes.c_uint64()
        code = ctypes.CDLL("libcuda.so.1").cuMemHostGetDevicePointer_v2(
            ctypes.byref(address), ctypes.c_void_p(addresses[name]), 0
        )
        if code:
            raise RefusedError(f"the GPU has no address for it: error {code} of the driver")
        addresses[name] = address.value
    return Bound(example=example, tensors=tensors, addresses=addresses)


def engine_launch(at: Bound, plans: Path) -> Launch:
    """The example's plan, loaded and bound."""
    from trt_kv.plugins.tensorrt_base import register_plugins, trt

    plan = plans / f"{at.example.name}.plan"
    if not plan.is_file():
        raise RefusedError("there is no plan, because none could be built")
    register_plugins()
    errors: list[str] = []
    logger = logger_of(errors)
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise RefusedError(f"the plan is not loaded: {'; '.join(errors)}")
    print("the plan is loaded", file=sys.stderr, flush=True)
    context = engine.create_execution_context()
    if context is None:
        raise RefusedError(f"there is no execution context: {'; '.join(errors)}")
    print("there is an execution context", file=sys.stderr, flush=True)
    for name in at.example.inputs(0):
        if not context.set_input_shape(name, tuple(at.tensors[name].shape)):
            raise RefusedError(f"the shape of {name!r} is not taken: {'; '.join(errors)}")
    for name in (*at.tensors, *at.example.in_place):
        if not context.set_tensor_address(name, at.addresses[at.example.in_place.get(name, name)]):
            raise RefusedError(f"the address of {name!r} is not taken: {'; '.join(errors)}")

    def launch(stream: int, _alive: Any = (logger, runtime, engine)) -> None:
        if not context.execute_async_v3(stream):
            raise RefusedError(f"the engine does not run: {'; '.join(errors)}")

    return launch


def enqueue_launch(at: Bound, _plans: Path) -> Launch:
    """The plugin of the example without an engine: TensorRT's calls are made directly."""
    from trt_kv.plugins.tensorrt_base import field_of, register_plugins, trt

    example = at.example
    assert isinstance(example, Attention)
    creator = register_plugins()[example.spec.name]
    fields = [field_of(a.name, a.type, example.attributes[a.name]) for a in example.spec.attributes]
    made = creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.RUNTIME)
    plugin = made.attach_to_context(None)
    inputs = list(example.inputs(0))
    outputs = [example.in_place.get(name, name) for name in example.spec.output_names]

    def descriptor(name: str) -> Any:
        desc = trt.PluginTensorDesc()
        desc.dims, desc.format = trt.Dims(tuple(at.tensors[name].shape)), trt.TensorFormat.LINEAR
        desc.type = {4: trt.float32, 8: trt.int64}[at.tensors[name].element_size()]
        return desc

    descriptors = [descriptor(name) for name in inputs], [descriptor(name) for name in outputs]
    addresses = [at.addresses[name] for name in inputs], [at.addresses[name] for name in outputs]
    plugin.on_shape_change(*descriptors)
    return lambda stream: plugin.enqueue(*descriptors, *addresses, 0, stream)


def runs(
    plans: Path,
    *,
    example: Callable[[], Example],
    launch_of: Callable[[Bound, Path], Launch] = engine_launch,
    pinned: tuple[str, ...] = (),
    alias: bool = False,
) -> str:
    """Launch three times with different inputs and compare."""
    import torch

    at = bound(example(), pinned=frozenset(pinned), alias=alias)
    launch, stream, worst = launch_of(at, plans), torch.cuda.Stream(), 0.0
    for seed in range(3):
        inputs = at.example.inputs(seed)
        at.fill(inputs)
        torch.cuda.synchronize()
        launch(stream.cuda_stream)
        torch.cuda.synchronize()
        worst = max(worst, at.check(inputs))
    same = {name: at.addresses[name] == at.tensors[name].data_ptr() for name in pinned}
    return f"differs by {worst:.2g} at most" + (f"; host and device address equal: {same}" if alias else "")


def is_recorded(
    plans: Path, *, mode: str, example: Callable[[], Example], launch_of: Callable[[Bound, Path], Launch] = engine_launch
) -> str:
    """Launch, record as a CUDA graph, replay with different inputs, and compare each time."""
    import torch

    at = bound(example())
    launch, stream = launch_of(at, plans), torch.cuda.Stream()
    for seed in range(2):  # everything that is compiled or allocated at a first call must be there before recording
        inputs = at.example.inputs(seed)
        at.fill(inputs)
        torch.cuda.synchronize()
        launch(stream.cuda_stream)
        torch.cuda.synchronize()
        at.check(inputs)
    print("it runs unrecorded", file=sys.stderr, flush=True)
    graph, worst = torch.cuda.CUDAGraph(), 0.0
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        launch(stream.cuda_stream)
    print("it is recorded", file=sys.stderr, flush=True)
    for seed in range(2, 5):
        inputs = at.example.inputs(seed)
        at.fill(inputs)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        worst = max(worst, at.check(inputs))
    return f"three replays differ by {worst:.2g} at most"


def runs_in_onnxruntime(_plans: Path) -> str:
    """The same library without Python bindings, as the ONNX Runtime plug-in that it is distributed as."""
    import torch

    from trt_kv.runtime.backends.onnx_runtime import ort

    torch.cuda.init()  # brings CUDA's libraries, which the plug-in links to
    provider = importlib.import_module("onnxruntime_ep_nv_tensorrt_rtx")
    ort.register_execution_provider_library("tensorrt_rtx", provider.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == provider.get_ep_name()]
    if not devices:
        raise RefusedError(f"it offers no device; there are: {[device.ep_name for device in ort.get_ep_devices()]}")
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(devices[:1], {})
    example = Plain()
    session = ort.InferenceSession(example.model().SerializeToString(), sess_options=options)
    inputs = example.inputs(0)
    error = float(np.abs(session.run(None, inputs)[0] - example.expected(inputs)["y"]).max())
    if not error <= example.within:
        raise RefusedError(f"it ran, and 'y' is wrong by {error}")
    return f"differs by {error:.2g} at most; providers: {session.get_providers()}"


def machine(_plans: Path) -> str:
    """GPU, driver and versions, as JSON. Imports only torch, so that only the driver can fail."""
    import torch

    if not torch.cuda.is_available():
        raise RefusedError("no CUDA device")
    major, minor = torch.cuda.get_device_capability()
    record = {"gpu": torch.cuda.get_device_name(), "capability": f"{major}.{minor}", "cuda": torch.version.cuda}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        record["driver"] = subprocess.run(query, capture_output=True, text=True, check=False, timeout=30).stdout.strip()
    except OSError:
        record["driver"] = "unknown: no nvidia-smi"
    record["python"] = platform.python_version()
    for package in PACKAGES:
        try:
            record[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return json.dumps(record)


RUNTIME = "does the TensorRT-RTX runtime run on this GPU"
PINNED = "can pinned memory be bound as an engine tensor"
GRAPHS = "does CUDA-graph capture work through the Python plugin's enqueue"
MODES = ("relaxed", "thread_local", "global")

BUILDS: Mapping[str, Callable[[Path], str]] = {
    f"build_{example.name}": functools.partial(is_built, example=example) for example in (Plain, Attention)
}
"""Plans that are built before the other facts are determined, by name."""
_plain, _attention = functools.partial(runs, example=Plain), functools.partial(runs, example=Attention)
FACTS: Mapping[str, tuple[str, Callable[[Path], str]]] = {
    "plain_engine": (RUNTIME, _plain),
    "plain_model_in_onnxruntime": (RUNTIME, runs_in_onnxruntime),
    "plugin_engine": (RUNTIME, _attention),
    "plugin_without_engine": (RUNTIME, functools.partial(_attention, launch_of=enqueue_launch)),
    "pinned_input": (PINNED, functools.partial(_plain, pinned=("x",))),
    "pinned_input_by_device_address": (PINNED, functools.partial(_plain, pinned=("x",), alias=True)),
    "pinned_output": (PINNED, functools.partial(_plain, pinned=("y",))),
    "pinned_output_by_device_address": (PINNED, functools.partial(_plain, pinned=("y",), alias=True)),
    "pinned_state_of_plugin_engine": (PINNED, functools.partial(_attention, pinned=("kv", "token_positions"))),
    "pinned_state_of_plugin_without_engine": (
        PINNED,
        functools.partial(_attention, pinned=("kv", "token_positions"), launch_of=enqueue_launch),
    ),
    **{f"graph_of_plain_engine_{m}": (GRAPHS, functools.partial(is_recorded, mode=m, example=Plain)) for m in MODES},
    **{f"graph_of_plugin_engine_{m}": (GRAPHS, functools.partial(is_recorded, mode=m, example=Attention)) for m in MODES},
    **{
        f"graph_of_plugin_without_engine_{m}": (
            GRAPHS,
            functools.partial(is_recorded, mode=m, example=Attention, launch_of=enqueue_launch),
        )
        for m in MODES
    },
}
"""The question of each fact, and the function that determines it: returns a sentence about the result, or raises."""


def main(name: str, file: Path, plans: Path) -> None:
    """Determine one fact and write the answer, yes or no. Any other outcome is raised as an exception."""
    from trt_kv.errors import TrtKvError
    from trt_kv.json_file import write_atomically

    find_tensorrt()
    known = {"machine": machine, **BUILDS} | {n: find_out for n, (_, find_out) in FACTS.items()}
    try:
        answer = {"outcome": "yes", "detail": known[name](plans)}
    except (RuntimeError, TrtKvError) as error:  # torch raises CUDA errors as RuntimeError
        traceback.print_exc()
        answer = {"outcome": "no", "detail": f"{type(error).__name__}: {error}"}
    write_atomically(file, json.dumps(answer).encode(), kind="answer", error=TrtKvError)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
