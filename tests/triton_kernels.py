"""What tests of Triton kernels share: the interpreter as a process, and the comparison with the reference."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.test_op_parity import by_slot, is_per_slot, live_slots, run
from trt_kv.opspec import OpSpec, Tolerance
from trt_kv.plugins.triton_compile import CAPABILITIES

ROOT = Path(__file__).parent.parent

HALF_TOLERANCE = Tolerance(
    atol=4e-3, rtol=4e-3, reason="the spec's cases in fp16: outputs and softmax weights rounded to 11 bits, inputs the same"
)
"""bf16 is left to GPUs: the interpreter computes in numpy, which has no such type."""

EACH_CAPABILITY = [
    pytest.param(capability, marks=() if capability in (90, max(CAPABILITIES)) else pytest.mark.slow)
    for capability in CAPABILITIES
]
"""A kernel takes a third of a second to compile: by default for the GPU of ``docs/kernels.md``, and for the newest."""


class Interpreter:
    """Triton's interpreter in a process of its own, started at the first request."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[str] | None = None

    def outputs(self, spec: OpSpec, inputs: dict[str, Any], dtype: str = "float32") -> dict[str, np.ndarray]:
        """The op's outputs by name, updated states included, as fp32 and int64."""
        arrays: dict[str, Any] = {name: value for name, value in inputs.items() if isinstance(value, np.ndarray)}
        np.savez(self.folder / "inputs.npz", **arrays)
        request = {
            "op": spec.name,
            "dtype": dtype,
            "attributes": {name: value for name, value in inputs.items() if name not in arrays},
            "inputs": str(self.folder / "inputs.npz"),
            "outputs": str(self.folder / "outputs.npz"),
        }
        process = self._started()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        if process.stdout.readline() != "done\n":
            errors = self.folder / "errors.txt"
            self.close()
            raise AssertionError(errors.read_text())
        with np.load(self.folder / "outputs.npz") as outputs:
            return {name: outputs[name] for name in outputs}

    def _started(self) -> "subprocess.Popen[str]":
        if self._process is None:
            with (self.folder / "errors.txt").open("w") as errors:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tests.triton_worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    text=True,
                    cwd=ROOT,
                    env={**os.environ, "TRITON_INTERPRET": "1"},
                )
        return self._process

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None


def rounded(spec: OpSpec, inputs: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The same inputs, those of the engine's compute type rounded to it, still as fp32."""
    floats = {t.name for t in spec.inputs if t.dtype == "float"} & set(inputs)
    half = {name: torch.from_numpy(inputs[name]).to(getattr(torch, dtype)).float().numpy() for name in floats}
    return inputs | half


def assert_equals_reference(
    spec: OpSpec, inputs: dict[str, Any], outputs: dict[str, np.ndarray], tolerance: Tolerance, written: Any = None
) -> None:
    """``outputs`` may have more rows and sequences than ``inputs`` asks for; ``written`` [M, P] are slots of padding."""
    expected = run(spec, "reference", inputs)
    live = live_slots(spec, inputs, expected)
    if written is not None:
        live &= ~written
    for name, reference in expected.items():
        got = by_slot(name, outputs[name])[: len(reference)]
        where = live if is_per_slot(name) else ...
        np.testing.assert_allclose(got[where], reference[where], atol=tolerance.atol, rtol=tolerance.rtol, err_msg=name)
