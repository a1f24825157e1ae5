"""How fast a run is and how much memory it holds, measured where it runs. Importing this costs no torch.

Rates come from the arrival of steps, because metrics may come in bursts: on a GPU the loop reads the numbers of several steps at once.
"""

from __future__ import annotations

import resource
import statistics
import sys
from collections import deque
from dataclasses import dataclass

import psutil  # type: ignore[import-untyped]

GIB = 2**30
WINDOW = 20
"""Steps whose median duration is shown: short enough to follow a change, long enough to pass over a save."""
BURST = 0.01
"""Seconds: steps that arrive closer together were read together, and share the time since the ones before."""


@dataclass(frozen=True)
class MemoryReading:
    """Bytes. `place`: "GPU" or "RAM"."""

    place: str
    now: int
    peak: int
    limit: int

    def __str__(self) -> str:
        return f"{self.place} {self.now / GIB:.1f}/{self.peak / GIB:.1f}/{self.limit / GIB:.1f} GiB"


def read_memory() -> MemoryReading:
    """What the device holds of this process now and held at most, and what there is; the host's memory where no GPU is in use."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        limit = int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
        return MemoryReading("GPU", int(torch.cuda.memory_reserved()), int(torch.cuda.max_memory_reserved()), limit)
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    resident = int(psutil.Process().memory_info().rss)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return MemoryReading("RAM", resident, max(resident, peak), int(psutil.virtual_memory().total))


class StepTimer:
    """Seconds per step, as the median of the last `WINDOW` steps. Steps that arrive in a burst count as one group of equal steps.

    `step`: what was finished when the timer began; None: unknown, and the first group only starts the clock.
    """

    def __init__(self, step: int | None, moment: float) -> None:
        self._step = step
        self._measured = step is not None
        """Whether the beginning of the open group is known."""
        self._start = self._first = self._last = moment
        """End of the group before; first and last arrival of the open group."""
        self._open = 0
        self._durations: deque[float] = deque(maxlen=WINDOW)

    def arrived(self, step: int, moment: float) -> None:
        """Step `step` is known to be finished at `moment` (seconds)."""
        together = moment - self._last < BURST and moment - self._first < 1.0
        if self._open and not together:
            self._close_group()
        if not self._open:
            self._first = moment
        self._open += 1 if self._step is None else max(0, step - self._step)
        self._step, self._last = step, moment

    def _close_group(self) -> None:
        if self._measured:
            self._durations.extend([(self._last - self._start) / self._open] * self._open)
        self._start, self._open, self._measured = self._last, 0, True

    def seconds_per_step(self) -> float | None:
        """None before anything was measured."""
        if self._durations:
            return statistics.median(self._durations)
        return (self._last - self._start) / self._open if self._measured and self._open and self._last > self._start else None
