"""Whole steps on one device: a decoder's dense layers and the ops' device kernels; on GPUs decode steps as CUDA graphs.

benchmarks/gpu/README.md lists what has been run on a GPU.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from trt_kv.errors import EngineError, UsageError, load_option
from trt_kv.plugins.graph_io import makers_of, step_inputs_of
from trt_kv.plugins.registry import Kernel, device_kernel
from trt_kv.program import Program
from trt_kv.runtime.backends.cuda.choice import chosen_tokens
from trt_kv.runtime.backends.cuda.decoder import DeviceDecoder, ModuleDecoder
from trt_kv.runtime.backends.cuda.step_buffers import StepBuffers, StepSizes
from trt_kv.runtime.backends.cuda.store import DeviceKvPool
from trt_kv.runtime.backends.devices import told_out_of_memory
from trt_kv.runtime.backends.ops import LayerOps
from trt_kv.runtime.backends.step import Choice, Chosen, Step, StepResult
from trt_kv.runtime.cache.kv_pool import KvPool

Tensors = dict[str, Tensor]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class _Recorded:
    """A step as a CUDA graph, and the tensors that hold its results after a replay."""

    graph: torch.cuda.CUDAGraph
    results: Tensors


class TorchDeviceExecutor:
    """Runs the steps of one pool on the pool's device. See ``StepExecutor``.

    The inputs of a step are copied to the device in one transfer; the host then launches, and waits once, for the results. Page
    tables are padded to a width that is a power of 2, decode steps also to a batch size that is one; padding writes to the
    pool's spare page.
    """

    def __init__(
        self,
        decoder: DeviceDecoder | nn.Module,
        programs: Mapping[str, Program],
        pool: DeviceKvPool,
        largest: StepSizes,
        *,
        cuda_graphs: bool | None = None,
        batch_invariant: bool = False,
        kernels: Callable[[str], Mapping[str, Kernel]] | None = None,
    ) -> None:
        """``decoder`` has the pool's dtype and device; a module is moved to the device. ``largest`` sizes the buffers.
        ``cuda_graphs``: capture decode steps as CUDA graphs; None: if the device is a GPU and the decoder can be captured.
        ``batch_invariant``: every decode step is padded to the largest sizes, so that matrix products and kernels sum in the
        same order whatever the batch: the logits of a sequence are then bit-identical in any batch.
        ``kernels(phase)``: kernels that replace the ops' own, see ``DeviceRecall.kernels``.

        Raises ``UsageError`` if decoder, pool and ``cuda_graphs`` do not match, ``EngineError`` for an op without device
        kernels.
        """
        on_gpu = pool.device.type == "cuda"
        self._decoder = ModuleDecoder(decoder, pool.device) if isinstance(decoder, nn.Module) else decoder
        spare_slot = _spare_slot(self._decoder, pool)
        if cuda_graphs:
            _check_recordable(self._decoder, pool)
        self._pool = pool
        self._largest = largest
        self._batch_invariant = batch_invariant
        self._ops: dict[str, LayerOps] = {}
        self._makers: dict[str, dict[str, list[int]]] = {}
        self._buffers: dict[str, StepBuffers] = {}
        for phase, program in programs.items():
            own = {} if kernels is None else kernels(phase)
            self._ops[phase] = LayerOps(program, partial(_kernel_of, own))
            self._makers[phase] = makers_of(program)
            self._buffers[phase] = StepBuffers(
                step_inputs_of(program), largest, n_layers=len(program), spare_slot=spare_slot, device=pool.device
            )
        # High priority, so that work that no step waits for, which is on other streams, yields to it.
        self._stream = (self._decoder.stream or torch.cuda.Stream(pool.device, priority=-1)) if on_gpu else None
        records = on_gpu and cuda_graphs is not False and self._decoder.can_be_recorded
        self._graphs: dict[StepSizes, _Recorded] | None = {} if records else None
        self._graph_memory = None if self._graphs is None else torch.cuda.graph_pool_handle()

    @property
    def description(self) -> str:
        device = self._pool.device
        on = torch.cuda.get_device_name(device) if self._stream is not None else f"the {device.type.upper()}"
        return f"{self._decoder.description} on {on}{'' if self._graphs is None else ', CUDA graphs'}"

    def warm_up(self) -> None:
        """Compile the kernels that the smallest steps launch, by running steps that are all padding."""
        smallest = StepSizes(n_tokens=1, n_rows=1, n_sequences=1, table_width=1)
        for phase in self._ops:
            sizes = smallest if phase == "decode" or self._largest.n_tokens < 2 else smallest.with_tokens(2)
            with self._on_stream():
                self._launch(phase, None, sizes)

    def run_step(self, phase: str, step: Step, pool: KvPool[Any]) -> StepResult:
        """See ``StepExecutor.run_step``. Raises ``CapacityError`` for a step larger than planned, or without memory."""
        values = self._values(phase, step, pool, None)
        return StepResult.assemble(step, values["logits"], self._made(phase, values))

    def run_step_choosing(self, step: Step, pool: KvPool[Any], choices: Sequence[Choice]) -> StepResult:
        """See ``ChoosingExecutor``; errors as for ``run_step``."""
        values = self._values("decode", step, pool, choices)
        rows = zip(values["token_ids"].tolist(), values["largest"].tolist(), strict=True)
        chosen = tuple(Chosen(token_id=token_id, largest=largest) for token_id, largest in rows)
        result = StepResult.assemble(step, np.empty((0, 0), np.float32), self._made("decode", values))
        return dataclasses.replace(result, chosen=chosen)

    def _made(self, phase: str, values: Arrays) -> dict[str, dict[int, Any]]:
        return {name: dict(zip(layers, values[name], strict=True)) for name, layers in self._makers[phase].items()}

    def _values(self, phase: str, step: Step, pool: KvPool[Any], choices: Sequence[Choice] | None) -> Arrays:
        """The results of a step on the host: logits, or, given ``choices``, tokens and the rows' largest logits."""
        if pool is not self._pool:
            raise UsageError("an executor on a device runs the steps of its own pool", fix="make one executor per pool")
        sizes = StepSizes.of(step, pool.page_size)
        sizes.check_within(self._largest)
        bucket = sizes.bucket(self._largest, one_token_each=phase == "decode", fixed=self._batch_invariant)
        with self._on_stream():
            recorded = self._graphs is not None and phase == "decode"
            results = self._replay(step, bucket) if recorded else self._launch(phase, step, bucket)
            results = _with_logits(results) if choices is None else _with_tokens(results, choices)
            # To pinned memory if the device is a GPU.
            on_host = {name: tensor.to("cpu", non_blocking=True) for name, tensor in results.items()}
        return {name: tensor.numpy() for name, tensor in on_host.items()}

    def _launch(self, phase: str, step: Step | None, sizes: StepSizes) -> Tensors:
        self._buffers[phase].fill(step, sizes)
        return self._compute(phase, self._buffers[phase].views(sizes))

    def _replay(self, step: Step, sizes: StepSizes) -> Tensors:
        assert self._graphs is not None
        if sizes not in self._graphs:
            self._graphs[sizes] = self._record(sizes)
        recorded = self._graphs[sizes]
        self._buffers["decode"].fill(step, sizes)
        recorded.graph.replay()
        return recorded.results

    def _record(self, sizes: StepSizes) -> _Recorded:
        """Capture a decode step, after a step that is all padding has compiled its kernels."""
        self._launch("decode", None, sizes)
        self._wait()
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(graph, pool=self._graph_memory, stream=self._stream, capture_error_mode="thread_local"):
            results = self._compute("decode", self._buffers["decode"].views(sizes))
        return _Recorded(graph=graph, results=results)

    @torch.inference_mode()
    def _compute(self, phase: str, tensors: Tensors) -> Tensors:
        """Everything that a step does on the device. Returns logits, the largest of each row and its token while decoding, and
        the ops' results for the runtime, one row per layer that has them. Nothing here may wait for the device.
        """
        attend = self._ops[phase].for_step(tensors | self._pool.states)
        logits = self._decoder(tensors["input_ids"], tensors["positions"], tensors["logit_rows"], attend)
        results = {name: torch.stack([*of_layers.values()]) for name, of_layers in attend.made.items()}
        logits_RV = logits.float()
        if phase == "decode":
            results |= {"token_ids": logits_RV.argmax(1), "largest": logits_RV.amax(1)}
        return results | {"logits": logits_RV}

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        """Run the block on the executor's stream, after all work on the current stream, such as the copies of a fork.

        Waits at the end for everything launched, after Ctrl-C too, because the next step overwrites the buffers that this one
        reads. ``CapacityError`` if the memory left to steps is too small.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._pool.device))
        with (
            told_out_of_memory(
                f"too little memory is left on {self._pool.device} for this step",
                fix=f"lower {load_option('cache_tokens')}, {load_option('chunk')}, batch or the profile, or free memory",
            ),
            nullcontext() if self._stream is None else torch.cuda.stream(self._stream),
        ):
            try:
                yield
            finally:
                self._wait()

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


def _with_logits(results: Tensors) -> Tensors:
    return {name: tensor for name, tensor in results.items() if name not in ("token_ids", "largest")}


@torch.inference_mode()
def _with_tokens(results: Tensors, choices: Sequence[Choice]) -> Tensors:
    """``results`` with the tokens of the first rows, which are not padding, in place of the logits."""
    n_rows, others = len(choices), {name: tensor for name, tensor in results.items() if name != "logits"}
    token_ids = chosen_tokens(results["logits"][:n_rows], results["token_ids"][:n_rows], choices)
    return others | {"token_ids": token_ids, "largest": results["largest"][:n_rows]}


def _kernel_of(own: Mapping[str, Kernel], op: str) -> Kernel:
    """The kernel that runs an op. ``EngineError`` if it is not in ``own`` and has no device kernels."""
    kernel = own.get(op) or device_kernel(op)
    if kernel is None:
        raise EngineError(
            f"{op} has no device kernels", expected="Triton, and the op's Triton kernels", fix="pip install 'trt-kv[gpu]'"
        )
    return kernel


def _check_recordable(decoder: DeviceDecoder, pool: DeviceKvPool) -> None:
    """``UsageError`` unless decode steps can be captured as CUDA graphs."""
    if pool.device.type != "cuda":
        raise UsageError("only GPUs replay CUDA graphs", got=str(pool.device), expected="a pool on cuda")
    if not decoder.can_be_recorded:
        raise UsageError(
            "these dense layers cannot be captured as a CUDA graph", got=decoder.description, fix="leave cuda_graphs out"
        )


def _spare_slot(decoder: DeviceDecoder, pool: DeviceKvPool) -> int:
    """The slot that padding writes to. ``UsageError`` if decoder and pool do not match."""
    for what, of_decoder, of_pool in (
        ("types", decoder.dtype, pool.dtype),
        ("devices", _with_index(decoder.device), _with_index(pool.device)),
    ):
        if of_decoder != of_pool:
            raise UsageError(f"the decoder and the pool have different {what}", got=str(of_decoder), expected=str(of_pool))
    if pool.spare_page is None:
        raise UsageError("steps are padded, and padding needs a spare page", fix="make the pool with spare_page=True")
    return pool.spare_page * pool.page_size


def _with_index(device: torch.device) -> torch.device:
    """``device`` with its index: "cuda" is the current GPU."""
    unclear = device.type == "cuda" and device.index is None
    return torch.device("cuda", torch.cuda.current_device()) if unclear else device
