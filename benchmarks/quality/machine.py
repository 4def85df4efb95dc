"""What a report says about the machine it was measured on."""

import os
import platform
from pathlib import Path

from benchmarks.quality.results import Machine


def this_machine() -> Machine:
    """CPU, cores and operating system."""
    return Machine(cpu=_cpu_name(), n_cores=os.cpu_count() or 1, system=f"{platform.system()} {platform.machine()}")


def _cpu_name() -> str:
    """The CPU's model name where Linux tells it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
