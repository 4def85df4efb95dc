"""Machine and versions that a report was measured with."""

import os
import platform
from pathlib import Path

import numpy as np
import torch

import trt_kv
from benchmarks.quality.results import Machine, Versions


def this_machine() -> Machine:
    """CPU, cores and operating system."""
    return Machine(cpu=_cpu_name(), n_cores=os.cpu_count() or 1, system=f"{platform.system()} {platform.machine()}")


def these_versions(executor: str) -> Versions:
    """Installed versions; ``executor`` runs the dense layers."""
    return Versions(
        trt_kv=trt_kv.__version__,
        python=platform.python_version(),
        numpy=np.__version__,
        torch=torch.__version__,
        executor=executor,
    )


def _cpu_name() -> str:
    """The CPU's model name from Linux, else Python's description of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
