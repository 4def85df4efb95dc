"""Peak memory of an action, whatever allocates it: the kernel's high-water mark of resident memory."""

import gc
from collections.abc import Callable
from pathlib import Path

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def peak_growth_bytes(action: Callable[[], object]) -> int:
    """Bytes by which resident memory rises above its present level while ``action`` runs.

    Linux only: ``OSError`` elsewhere. Freed memory that was not returned to the system is reused first, so this is exact in a
    fresh process and a lower bound in others.
    """
    gc.collect()
    CLEAR_REFS.write_text(RESET_PEAK)
    before = _status_bytes("VmRSS")
    action()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024
