"""Where the time from the command to the first step goes."""

from __future__ import annotations

import os
import time
from pathlib import Path

_STATE = Path("/proc/self/stat")
_STARTED = 19
"""Place of the start time in what follows the name there (proc(5): field 22)."""


class Phases:
    """Seconds of one phase after the other. The first one began with the process, where the system tells when that was."""

    def __init__(self) -> None:
        self._began = self._last = time.perf_counter() - process_age()
        self.seconds: dict[str, float] = {}

    def done(self, name: str) -> None:
        """The phase `name` ends now; what comes is another one. A name that comes again is added up."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    @property
    def total(self) -> float:
        """Seconds until the last phase ended."""
        return self._last - self._began


def process_age() -> float:
    """Seconds since this process was started, to a hundredth; 0 where the system does not tell."""
    try:
        ticks = int(_STATE.read_text().rpartition(")")[2].split()[_STARTED])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0
