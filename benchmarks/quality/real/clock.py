"""How long a measurement may take, and how its time is divided."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Runs from its creation; ``minutes`` None: for ever."""

    minutes: float | None
    began: float = field(default_factory=time.monotonic)

    def until(self, share: float) -> Callable[[], bool]:
        """Whether this share of the minutes is over."""
        end = float("inf") if self.minutes is None else self.began + 60 * self.minutes * share
        return lambda: time.monotonic() > end
