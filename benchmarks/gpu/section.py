"""``python -m benchmarks.gpu.section NAME FILE [--quick]``: one section of ``python -m benchmarks.gpu``, in its own process.

After a CUDA error every later CUDA call of the process fails too.
"""

import functools
import importlib
import importlib.metadata
import os
import sys
from pathlib import Path

import numpy as np

from benchmarks.harness import measured, save
from trt_kv.plugins.triton_interpreter import change_language_once


def main(name: str, file: str, *, quick: bool) -> None:
    """Measure the section and write its document. Without a GPU the kernels run in Triton's interpreter."""
    import torch

    if not torch.cuda.is_available():
        # Must be set before Triton is imported, which the kernels do.
        os.environ["TRITON_INTERPRET"] = "1"
        np.seterr(divide="ignore")  # log2(0) is intended
        change_language_once()
    from benchmarks.gpu.device import gpu_record

    module = importlib.import_module(f"benchmarks.gpu.{name}")
    document = measured(functools.partial(module.run, quick=quick))
    document["gpu"] = gpu_record()
    document["packages"]["triton"] = importlib.metadata.version("triton")
    document["quick"] = quick
    save(document, Path(file))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], quick="--quick" in sys.argv[3:])
