"""How OpenMP's threads wait for the next kernel: awake for some microseconds, then asleep (docs/decisions/0059)."""

import os

WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "3000"}
"""About 50 microseconds. A decode step has a hundred kernels, and waking a thread for each takes as long as the kernels."""


def let_threads_wait() -> None:
    """Set that for this process and its children, unless the environment says how threads wait.

    To be called before anything loads OpenMP (numba, torch), which reads it once.
    """
    if not WAITING.keys() & os.environ.keys():
        os.environ.update(WAITING)
