"""Runs Triton kernels in Triton's interpreter, on request, line by line: {"op", "inputs", "outputs", "dtype", "attributes"}.

A process of its own: TRITON_INTERPRET has to be set before a kernel's module is imported, and such kernels cannot be compiled.
"""

import json
import sys
from typing import Any

import numpy as np
import torch

from tests.interpreted import prepare
from trt_kv.plugins.registry import device_kernel, op_specs


def device_outputs(op: str, inputs: dict[str, Any], *, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """All outputs of the op's Triton kernels by name, updated states included; "float" tensors in ``dtype``, numpy in."""
    spec = op_specs()[op]
    kernel = device_kernel(op)
    assert kernel is not None
    floats = {t.name for t in spec.inputs if t.dtype == "float"}
    given = {
        name: torch.from_numpy(value).to(device, dtype if name in floats else None) if isinstance(value, np.ndarray) else value
        for name, value in inputs.items()
    }
    results = kernel(**given)
    return dict(zip(spec.output_names, [*results, *(given[t.name] for t in spec.states)], strict=True))


def answer(request: dict[str, Any]) -> None:
    with np.load(request["inputs"]) as arrays:
        inputs = {name: arrays[name] for name in arrays}
    dtype = getattr(torch, request["dtype"])
    outputs = device_outputs(request["op"], inputs | request["attributes"], dtype=dtype, device="cpu")
    arrays_out: dict[str, Any] = {n: (t.float() if t.is_floating_point() else t).numpy() for n, t in outputs.items()}
    np.savez(request["outputs"], **arrays_out)


if __name__ == "__main__":
    prepare()
    for line in sys.stdin:
        answer(json.loads(line))
        sys.stdout.write("done\n")
        sys.stdout.flush()
