"""The torch executor of a device computes every family as the host does, in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoints import FAMILY_SAMPLES, write_checkpoint
from tests.device_steps import Side, requests, runner_on_the_host
from tests.triton_kernels import ROOT
from trt_kv.export.checkpoints.opening import open_checkpoint

SIDES = (Side(policy="full"), Side(policy="snapkv"), Side(policy="freekv"))
ATOL = 1e-4
CASES: list[Any] = [("gemma2", SIDES[:1]), *(pytest.param(name, SIDES, marks=pytest.mark.slow) for name in FAMILY_SAMPLES)]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("sample", "sides"), CASES)
def test_a_device_computes_every_family_as_the_host_does(sample: str, sides: tuple[Side, ...], tmp_path: Path) -> None:
    folder, results = write_checkpoint(tmp_path / "checkpoint", sample), tmp_path / "results.npz"
    if all(open_checkpoint(folder).config.windows or [0]):
        sides = sides[:1]  # no layer is left to a policy
    outcome = subprocess.run(
        [sys.executable, "-m", "tests.device_steps", str(folder), str(results), *map(str, sides)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    assert outcome.returncode == 0, outcome.stderr
    with np.load(results) as arrays:
        for side in sides:
            for name, expected in requests(runner_on_the_host(side.policy, open_checkpoint(folder))).items():
                got = arrays[f"{side}.{name}"]
                np.testing.assert_allclose(
                    got, expected, atol=ATOL if name in ("prefill", "decode") else 0, err_msg=f"{side} {name}"
                )
