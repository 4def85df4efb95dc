"""How many CPUs this process may use: those it may run on, or its control group's share of the machine, if that is less."""

import math
import os
from collections.abc import Iterator
from pathlib import Path

from trt_kv.runtime import memory


def usable_cpus() -> int:
    """At least one; a fraction of a CPU counts as one."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *map(math.ceil, _quotas())]))


def threads_for(n_threads: int) -> int:
    """The threads that compute for the option ``n_threads``: 0 is one per usable CPU, and more than that would only wait."""
    return min(n_threads or usable_cpus(), usable_cpus())


def _quotas() -> Iterator[float]:
    """CPUs' worth of time under each limit of this process's control groups (version 2, and version 1)."""
    if not memory.OWN_CGROUPS.is_file():
        return
    for line in memory.OWN_CGROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _quotas_under(memory.CGROUPS, path, ("cpu.max",))
        elif "cpu" in controllers.split(","):
            yield from _quotas_under(memory.CGROUPS / "cpu", path, ("cpu.cfs_quota_us", "cpu.cfs_period_us"))


def _quotas_under(root: Path, path: str, files: tuple[str, ...]) -> Iterator[float]:
    """Of a control group and each of its ancestors: its quota over its period."""
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        if folder != root and root not in folder.parents:
            return
        try:
            quota, period = map(int, " ".join((folder / file).read_text() for file in files).split())
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
        if quota > 0 and period > 0:
            yield quota / period
