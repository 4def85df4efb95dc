"""Host memory that caches may use: free memory of the machine and the container, less weights mapped from files."""

import os
from collections.abc import Iterator
from pathlib import Path

from trt_kv.errors import CapacityError, TrtKvError, load_option

MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


_OUT_OF_MEMORY_TEXTS = ("bad_alloc", "Failed to allocate memory", "failed to allocate", "Cannot allocate memory")
"""What libraries write whose errors have no type for it."""


def memory_error(error: Exception, what: str) -> CapacityError | None:
    """The ``CapacityError`` for an error by which ``what`` ran out of memory; None if ``error`` is another one."""
    if isinstance(error, TrtKvError):
        return None
    if not isinstance(error, MemoryError) and not any(text in str(error) for text in _OUT_OF_MEMORY_TEXTS):
        return None
    return CapacityError(
        f"{what} needs more memory than this process can have",
        got=str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__,
        fix="free memory, raise the process's limit (ulimit -v), or lower "
        + " or ".join(map(load_option, ("cache_tokens", "host_tokens", "chunk"))),
    )


def available_bytes() -> int:
    """Bytes that can be allocated without swapping or an out-of-memory kill: Linux' MemAvailable, which counts reclaimable file
    caches, or what is left under the limit of any control group of this process, if that is less.

    Without /proc/meminfo: all physical memory.
    """
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if MEMINFO.is_file():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) * 1024
    return max(0, min([free, *_left_in_cgroups()]))


def free_for_cache(mapped_bytes: int) -> int:
    """Bytes for caches beside ``mapped_bytes`` of weights mapped from files. The kernel counts the pages of these weights as
    available, but every step reads them.
    """
    return max(0, available_bytes() - mapped_bytes)


def _left_in_cgroups() -> Iterator[int]:
    """Bytes left under each memory limit of this process (control groups of version 2, and of version 1)."""
    if not OWN_CGROUPS.is_file():
        return
    for line in OWN_CGROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield from _left_under(CGROUPS, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = CGROUPS / "memory"
            yield from _left_under(root, path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def _left_under(root: Path, path: str, limit_file: str, usage_file: str, droppable: str) -> Iterator[int]:
    """For a control group and each of its ancestors: the limit, less the used memory that cannot be reclaimed."""
    group = root / path.lstrip("/")
    for folder in (group, *group.parents):
        if folder != root and root not in folder.parents:
            return
        try:
            limit = (folder / limit_file).read_text().strip()
            most = None if limit == "max" else int(limit)
            used = int((folder / usage_file).read_text())
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            left_out = int(stat.get(droppable, 0))
        except (OSError, ValueError):
            continue
        if most is not None:
            yield most - max(0, used - left_out)
