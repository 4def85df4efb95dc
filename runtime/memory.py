"""How much memory there is to plan with."""

import os
from pathlib import Path

MEMINFO = Path("/proc/meminfo")


def available_bytes() -> int:
    """Memory that can be taken without swapping, file caches that the kernel would drop included (Linux' MemAvailable).

    Where the kernel does not tell: all physical memory.
    """
    if MEMINFO.is_file():
        for line in MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
