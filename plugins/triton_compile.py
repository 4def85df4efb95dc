"""Ahead-of-time compilation of the ops' Triton kernels without a GPU, and the resources that the code needs.

There is no list of kernels: each op is run on meta tensors of the shapes of real models, and whatever it would launch is
compiled. ``python -m trt_kv.plugins.triton_compile > docs/kernels.md`` writes the table.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trt_kv.opspec import OpSpec
from trt_kv.plugins.recall_attention.page_counts import summary_rows
from trt_kv.plugins.registry import device_kernel, op_specs
from trt_kv.plugins.triton_launch import OPTIONS, Launch, recording
from trt_kv.require import require

CAPABILITIES = (80, 86, 89, 90, 100, 120)
"""Compute capabilities: A100, RTX 30, RTX 40 and L4, H100, B200, RTX 50."""

SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Largest shared memory of a block (CUDA C++ programming guide, technical specifications per compute capability)."""

DTYPES = (torch.float16, torch.bfloat16, torch.float32)

MODELS: Mapping[str, Mapping[str, int]] = {
    "Llama-3.2-1B": {"H": 32, "K": 8, "D": 64},
    "Llama-3.1-8B": {"H": 32, "K": 8, "D": 128},
    "Llama-3.1-70B": {"H": 64, "K": 8, "D": 128},
    "Qwen2.5-7B": {"H": 28, "K": 4, "D": 128},
}
"""Query heads, KV heads and head size."""

STEPS: Mapping[str, Mapping[str, int]] = {"decode": {"N": 4, "B": 4}, "prefill": {"N": 2048, "B": 1}}
_SIZES = {"P": 32, "L": 2, "T": 1024, "M": 8192, "U": 8, "2": 2}


@dataclass(frozen=True, kw_only=True)
class Resources:
    """Resources of one kernel: registers and local memory (spills) per thread, shared memory per block."""

    registers: int
    local_bytes: int
    shared_bytes: int
    ptx: str


def op_launches(spec: OpSpec, model: str, step: str, dtype: torch.dtype) -> Iterator[Launch]:
    """Launches of the op in a step of a model, with every combination of attributes that the spec's cases have."""
    run = device_kernel(spec.name)
    assert run is not None
    sizes = {**_SIZES, **MODELS[model], **STEPS[step]}
    sizes["B+1"] = sizes["B"] + 1
    types = {"float": dtype, "float32": torch.float32, "int64": torch.int64}
    defaults = {a.name: a.default for a in spec.attributes} | {"layer": 1, "page_size": sizes["P"]}
    defaults |= {"scale": sizes["D"] ** -0.5} if "scale" in defaults else {}
    optional = [t.name for t in spec.inputs if t.optional]
    for case in spec.cases:
        summary = case.attributes.get("summary", 0)
        assert isinstance(summary, int)
        sizes["S"] = summary_rows(summary, sizes["P"], str(dtype).removeprefix("torch."))
        tensors = {t.name: torch.empty([sizes[a] for a in t.axes], dtype=types[t.dtype], device="meta") for t in spec.inputs}
        given = {name: t for name, t in tensors.items() if name not in optional or name in case.values}
        with recording() as launches:
            run(**given, **(defaults | dict(case.attributes)))
        yield from launches


def distinct_launches(
    specs: Mapping[str, OpSpec], models: Iterable[str], dtypes: tuple[torch.dtype, ...] = DTYPES
) -> list[Launch]:
    """All launches of the ops, without duplicates that compile to the same code."""
    found: dict[Any, Launch] = {}
    for spec in specs.values():
        for model in models:
            for step in STEPS:
                for dtype in dtypes:
                    found |= {launch.key: launch for launch in op_launches(spec, model, step, dtype)}
    return list(found.values())


def specs_with_kernels() -> dict[str, OpSpec]:
    """The specs of the ops that have Triton kernels."""
    return {name: spec for name, spec in op_specs().items() if device_kernel(name) is not None}


def compiled(launch: Launch, capability: int) -> Resources:
    """Compile for a compute capability (90: sm_90). Raises Triton's own errors."""
    triton: Any = require("triton")
    compiler: Any = require("triton.compiler")
    backends: Any = require("triton.backends.compiler")
    names = list(launch.signature)
    source = compiler.ASTSource(
        launch.kernel,
        dict(launch.signature),
        constexprs={(names.index(name),): value for name, value in launch.constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned},
    )
    options = {"num_warps": launch.warps, "num_stages": launch.stages, **OPTIONS}
    kernel = triton.compile(source, target=backends.GPUTarget("cuda", capability, 32), options=options)
    registers, local_bytes = _registers_and_stack(kernel.asm["cubin"])
    return Resources(
        registers=registers, local_bytes=local_bytes, shared_bytes=int(kernel.metadata.shared), ptx=kernel.asm["ptx"]
    )


def _registers_and_stack(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory per thread, as reported by the cuobjdump that comes with Triton."""
    tool = require("triton").knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        shown = subprocess.run([tool, "-res-usage", str(file)], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown)
    assert found is not None, shown
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def kernels_markdown(capability: int = 90) -> str:
    """A table of all kernels of all models, compiled for one compute capability."""
    lines = [
        "# GPU kernels\n",
        f"Made by `python -m trt_kv.plugins.triton_compile` with Triton {require('triton').__version__} for sm_{capability}:",
        "registers and spilled bytes per thread, shared memory per block, for pages of 32 slots and the shapes of",
        f"{', '.join(MODELS)}; ranges are over those. The numbers are the compiler's.\n",
        "| kernel | type | registers | spilled bytes | shared KiB |",
        "|---|---|---|---|---|",
    ]
    rows: dict[tuple[str, str], list[Resources]] = {}
    for dtype in DTYPES:
        for launch in distinct_launches(specs_with_kernels(), MODELS, (dtype,)):
            key = (launch.name.removesuffix("_kernel"), str(dtype).removeprefix("torch."))
            rows.setdefault(key, []).append(compiled(launch, capability))
    for (name, dtype_name), found in sorted(rows.items()):
        spans = (
            _span([r.registers for r in found]),
            _span([r.local_bytes for r in found]),
            _span([-(-r.shared_bytes // 1024) for r in found]),
        )
        lines.append(f"| {name} | {dtype_name} | {' | '.join(spans)} |")
    return "\n".join(lines)


def _span(values: list[int]) -> str:
    return f"{min(values)}" if min(values) == max(values) else f"{min(values)}–{max(values)}"


if __name__ == "__main__":
    sys.stdout.write(kernels_markdown() + "\n")
