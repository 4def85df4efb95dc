"""Loads an engine on a device: dense layers in torch or ONNX Runtime, KV ops in Triton; all caches are allocated here."""

from pathlib import Path

import torch

from trt_kv.errors import UsageError, load_option
from trt_kv.layer_budget import ALL
from trt_kv.manifest import GRAPHS, Manifest
from trt_kv.profiles import build_profile
from trt_kv.program import budgets_of, finds_budgets, recalling_layers
from trt_kv.require import require
from trt_kv.runtime.backends.cuda.decoder import DeviceDecoder, ModuleDecoder
from trt_kv.runtime.backends.cuda.executor import TorchDeviceExecutor
from trt_kv.runtime.backends.cuda.plan import DEFAULT_BATCH, DevicePlan, Wanted, device_plan
from trt_kv.runtime.backends.cuda.recall.driver import DeviceRecall
from trt_kv.runtime.backends.cuda.recall.working_set import BlockSizes
from trt_kv.runtime.backends.cuda.reservation import LargestStep, WorkingSetBlocks
from trt_kv.runtime.backends.cuda.store import TORCH_TYPES, DeviceKvPool
from trt_kv.runtime.backends.cuda.weights import decoder_from_engine
from trt_kv.runtime.backends.devices import DENSE, DeviceOptions, free_device_bytes, told_out_of_memory
from trt_kv.runtime.backends.host.segments import check_shapes
from trt_kv.runtime.cache.draws import draws_of, most_generated
from trt_kv.runtime.loading import (
    Loaded,
    LoadOptions,
    OnProgress,
    check_kv_as_computed,
    check_no_host_tier,
    check_policy_for_devices,
    check_reads_whole_prompts,
)
from trt_kv.runtime.memory import available_bytes
from trt_kv.runtime.model_runner import ModelRunner
from trt_kv.runtime.reservation import CachePages, HostPages, Places, Reservation, Resource


def load(
    folder: Path, manifest: Manifest, options: LoadOptions, on: DeviceOptions, device: torch.device, tell: OnProgress
) -> Loaded:
    """Load dense layers and KV ops on ``device``. If the policy recalls, the cache is in pinned memory of the host.

    ``UsageError`` for engines and options that cannot run there, ``CapacityError`` if there is too little memory,
    ``MissingDependencyError`` for a library that is not installed. The device "cpu" means device kernels on the CPU, which only
    Triton's interpreter can run.
    """
    dtype = on.dtype or manifest.dtype
    wanted = _wanted(options, on)
    _check(folder, manifest, options, on, device)
    check_kv_as_computed(folder, manifest, options, dtype)
    with told_out_of_memory(
        f"too little free memory for this engine on {device}",
        fix=f"lower {load_option('cache_tokens')} or {load_option('host_tokens')}, use {load_option('dtype', 'bfloat16')}, "
        "or free memory",
    ):
        decoder = _decoder(folder / GRAPHS, manifest, on.dense or DENSE[0], dtype, device, tell)
        plan = device_plan(
            manifest,
            wanted,
            dtype=dtype,
            free_device=free_device_bytes(device) if device.type == "cuda" else available_bytes(),
            free_host=available_bytes(),
        )
        tell("allocating memory", 0, 1)
        pool = DeviceKvPool(
            n_pages=plan.n_pages,
            page_size=manifest.page_size,
            n_kv_heads=manifest.config.n_kv_heads,
            head_size=manifest.config.head_dim,
            dtype=dtype,
            device=device,
            spare_page=True,
        )
        recall = None
        if plan.recall is not None:
            recall = DeviceRecall(manifest.programs["prefill"], plan.recall, pool, n_query_heads=manifest.config.n_heads)
        executor = TorchDeviceExecutor(
            decoder,
            manifest.programs,
            pool,
            plan.largest,
            cuda_graphs=on.cuda_graphs,
            batch_invariant=bool(on.batch_invariant),
            kernels=None if recall is None else recall.kernels,
        )
        tell("allocating memory", 1, 1)
    runner = ModelRunner(
        executor,
        pool,
        manifest.programs,
        chunk=wanted.chunk,
        decode=manifest.applied_policy.decode,
        decode_distance=manifest.applied_policy.decode_distance,
        draws=draws_of(manifest.applied_policy),
        tiers=recall,
        trace=options.trace,
    )
    return Loaded(
        runner=runner,
        reservation=_reservation(manifest, options, plan, pool, recall, chunk=wanted.chunk),
        token_budget=options.token_budget,
    )


def _wanted(options: LoadOptions, on: DeviceOptions) -> Wanted:
    """The requested sizes: from the options, and from the profile if one is named."""
    profile = None if on.profile is None else build_profile(on.profile)
    own = {"cache_tokens": options.cache_tokens, "host_tokens": options.host_tokens}
    if profile is None:
        return Wanted(chunk=options.chunk, batch=DEFAULT_BATCH if on.batch is None else on.batch, **own)
    most_tokens, most_sequences = (
        max(most for *_, most in ranges) for ranges in (profile.prefill_tokens, profile.decode_sequences)
    )
    return Wanted(
        chunk=min(options.chunk, most_tokens),
        batch=most_sequences if on.batch is None else on.batch,
        context_tokens=profile.context_tokens[-1],
        most_cache_tokens=profile.cache_tokens[-1],
        **own,
    )


def _check(folder: Path, manifest: Manifest, options: LoadOptions, on: DeviceOptions, device: torch.device) -> None:
    """``UsageError`` for engines and options that can be refused before weights are read."""
    if manifest.plan is not None:
        raise UsageError(
            f"{folder} is a TensorRT plan, which runs only on the GPU that it was built for",
            got=f"the device {device}",
            fix="leave the device out, or build an engine with --target onnxruntime",
        )
    if manifest.quantization is not None:
        raise UsageError(
            f"{folder} has quantised weights, which run on a CPU only",
            got=f"int{manifest.quantization.bits} weights on the device {device}",
            fix="use the device cpu, or build the engine without --quant",
        )
    check_reads_whole_prompts(folder, manifest)
    check_policy_for_devices(folder, manifest)
    if not manifest.applied_policy.recalls:
        check_no_host_tier(folder, manifest, options)
    elif finds_budgets(manifest.programs["prefill"]):
        raise UsageError(
            "recall on a device needs budgets that do not depend on the prompt",
            got=f"policy {manifest.policy.name!r} with budget {manifest.policy.budget}",
            fix="use the device cpu, or build with another budget",
        )
    elif options.host_tier not in (None, "ram"):
        raise UsageError(
            "recall on a device needs a host tier in memory, not in a file",
            got=f"host_tier={options.host_tier}",
            expected="ram",
            fix="leave host_tier out, or use the device cpu",
        )
    if on.dense == "onnxruntime" and on.dtype not in (None, manifest.dtype):
        raise UsageError(
            "ONNX Runtime computes in the type of the engine's graphs",
            got=f"dtype={on.dtype}",
            expected=manifest.dtype,
            fix="use dense=torch, which converts weights when it loads them",
        )
    if on.dense == "onnxruntime" and on.cuda_graphs:
        raise UsageError(
            "steps with ONNX Runtime cannot be captured as CUDA graphs",
            got="dense=onnxruntime, cuda_graphs=True",
            fix="leave cuda_graphs out, or use dense=torch",
        )


def _decoder(graphs: Path, manifest: Manifest, dense: str, dtype: str, device: torch.device, tell: OnProgress) -> DeviceDecoder:
    if dense == "torch":
        module = decoder_from_engine(
            graphs,
            manifest.config,
            dtype=TORCH_TYPES[dtype],
            device=device,
            on_weight=lambda done, total: tell("loading weights", done, total),
        )
        return ModuleDecoder(module, device)
    onnxruntime_device = require("trt_kv.runtime.backends.cuda.onnxruntime_segments")
    decoder = onnxruntime_device.OnnxRuntimeDeviceDecoder(
        graphs,
        manifest.segments,
        manifest.attention_ports,
        device=device,
        on_segment=lambda done, total: tell("opening graphs", done, total),
    )
    check_shapes(graphs, decoder.shapes, manifest.attention_ports, manifest.config)
    checked: DeviceDecoder = decoder
    return checked


def _reservation(
    manifest: Manifest,
    options: LoadOptions,
    plan: DevicePlan,
    pool: DeviceKvPool,
    recall: DeviceRecall | None,
    *,
    chunk: int,
) -> Reservation:
    policy, budgets, page_size = manifest.applied_policy, budgets_of(manifest.programs["prefill"]), manifest.page_size
    windows, n_most = manifest.windows, plan.largest.n_sequences
    places = Places(min(n_most, options.max_sequences or n_most), "send fewer at once, or load the engine with a larger batch")
    if recall is None or plan.recall is None:
        n_protected = policy.sinks + policy.recent
        pages = CachePages(
            pool,
            budgets=budgets,
            n_protected=n_protected,
            windows=windows,
            chunk=chunk,
            most=plan.most,
            most_generated=most_generated(policy, page_size),
        )
        return Reservation([places, pages], [LargestStep(plan.largest, page_size=page_size, most_held=pages.most_in_any_layer)])
    layers = recalling_layers(manifest.programs["decode"])
    longest = page_size * min(plan.largest.table_width, plan.recall.host_pages // len(layers))
    block_pages = BlockSizes.of(manifest.programs["prefill"], longest).n_pages
    resources: list[Resource] = [
        places,
        HostPages(recall.host, n_layers=len(layers)),
        WorkingSetBlocks(recall.sets, layers=layers, n_blocks=plan.recall.sequences * len(layers), block_pages=block_pages),
    ]
    if len(layers) < len(budgets):
        whole = [window for layer, window in enumerate(windows) if layer not in layers]
        whole_pages = CachePages(pool, budgets=[ALL] * len(whole), n_protected=0, windows=whole, chunk=chunk, most=plan.most)
        resources.append(whole_pages)
    limit = LargestStep(plan.largest, page_size=page_size, longest_prompt=plan.recall.longest_prompt)
    return Reservation(resources, [limit])
