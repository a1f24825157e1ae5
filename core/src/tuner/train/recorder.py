"""Keeps the files current by which others watch a run: its heartbeat, its pace, its report. Nothing here may fail or slow a training."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from types import TracebackType

from tuner.data.manifest import Manifest
from tuner.errors import DiskError
from tuner.inspect.dataset_sheet import describe_dataset
from tuner.plugins.record import reason_of
from tuner.train.run import RunFolder, now
from tuner.watch.pace import MemoryReading, StepTimer, read_memory
from tuner.watch.report import write_report

BEAT = 10.0
"""Seconds between two heartbeats while no step ends: a run that encodes, loads or samples for long is alive too."""
PACE = 1.0
"""Least seconds between two rows of pace.jsonl."""
SHARE = 0.02
"""Of a run's time, at most so much goes into writing reports in between; the one at the end is always written."""
NEWS = frozenset({"checkpoint", "sample", "sample_failed", "heldout"})
"""Events after which the report is written anew."""


class Recorder:
    """Told by the run what it is doing. Use as a context manager; leaving it with an exception records a failed run.

    `active`: False on all ranks but the first, where it does nothing. `total`: steps of the whole run.
    """

    def __init__(
        self, folder: RunFolder, total: int, note: Callable[[str], None], *, active: bool = True,
        clock: Callable[[], float] = time.monotonic, memory: Callable[[], MemoryReading] = read_memory, beat: float = BEAT,
    ) -> None:  # fmt: skip
        self.folder, self.total = folder, total
        self._note, self._active, self._clock, self._memory, self._beat = note, active, clock, memory, beat
        self._timer: StepTimer | None = None
        self._step = 0
        self._paced = self._reported = clock()
        self._cost = 0.0
        """Seconds that the last report took."""
        self._stale = False
        self._said: dict[str, str] = {}
        """File -> why it was not written: said once."""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True)

    def __enter__(self) -> Recorder:
        if self._active:
            self.folder.listeners.append(self._heard)
            self.folder.heartbeat(0, self.total, "starting", {"started": now()})
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if not self._active:
            return
        self._stop.set()
        self._thread.join()
        if error is not None:
            with suppress(DiskError):
                self.stage("stopped" if isinstance(error, (KeyboardInterrupt, SystemExit)) else "failed")
        self.report()

    @property
    def reached(self) -> int:
        """The last step that arrived."""
        return self._step

    def stage(self, state: str, step: int | None = None) -> None:
        """What is going on now: "caching", "loading", "saving", "finished", "stopped". What cannot be written is a note."""
        self._step = self._step if step is None else step
        if self._active:
            self._attempt("heartbeat.json", partial(self.folder.heartbeat, self._step, self.total, state))

    def step(self, step: int, row: Mapping[str, float]) -> None:
        """A step's numbers arrived. What cannot be written is a note: a disk that is full for a moment ends no training."""
        if not self._active:
            return
        moment = self._clock()
        self._timer = self._timer or StepTimer(None, moment)
        self._timer.arrived(step, moment)
        self._step = step
        facts: dict[str, object] = {
            "stepped": now(), "seconds_per_step": self._timer.seconds_per_step(),
            "metrics": {name: value for name, value in row.items() if name.count("/") < 2},  # without the bands of sigma
        }  # fmt: skip
        if moment - self._paced >= PACE or step >= self.total:
            self._paced = moment
            facts["memory"] = asdict(self._memory())
            self._attempt("pace.jsonl", partial(self.folder.pace, step, {"seconds": facts["seconds_per_step"], "memory": facts["memory"]}))
        self._attempt("heartbeat.json", partial(self.folder.heartbeat, step, self.total, "training", facts))
        if self._stale and self._cost <= SHARE * (moment - self._reported):
            self.report()

    def dataset(self, manifest: Manifest, batch_size: int, seed: int) -> None:
        """Writes dataset.json; what goes wrong is a note."""
        if self._active:
            self._attempt("dataset.json", lambda: self.folder.write_dataset(describe_dataset(manifest, batch_size, seed)))

    def report(self) -> None:
        """Writes report.html; what goes wrong is a note."""
        began = self._clock()
        self._attempt("report.html", lambda: write_report(self.folder.path, self.folder.write_page))
        self._stale, self._reported = False, self._clock()
        self._cost = self._reported - began

    def _attempt(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # what is for people, whatever is wrong with it, is no reason to lose a training
            reason = f"{name} was not written: {reason_of(error)}"
            if self._said.get(name) != reason:
                self._note(reason)
            self._said[name] = reason

    def _heard(self, kind: str, facts: Mapping[str, object]) -> None:
        self._stale = self._stale or kind in NEWS

    def _keep_beating(self) -> None:
        while not self._stop.wait(self._beat):
            with suppress(DiskError):
                self.folder.beat_again()
