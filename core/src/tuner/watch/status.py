"""How a run is doing, told from its folder alone: alive, finished, stopped, failed or died without a word."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]

from tuner.watch.folder import CONFIG, HEARTBEAT, METRICS, RUN, Row, RunFiles, mapping, number, text

State = Literal["running", "finished", "stopped", "failed", "died"]
FINAL: Mapping[str, State] = {"finished": "finished", "stopped": "stopped", "failed": "failed"}
"""What a run writes last -> how it ended."""
SILENT = 120.0
"""Seconds without a heartbeat after which a run counts as dead, where its process cannot be looked at. A living run beats every 10 s."""
ROUNDING = 2.0
"""Seconds by which a process may seem younger than the heartbeat it wrote first."""


@dataclass(frozen=True)
class RunStatus:
    """One run at one moment. Times are in seconds, memory in bytes; None: not known."""

    name: str
    path: Path
    """As it was asked for."""
    state: State
    doing: str
    """Of a running one: "caching", "training", ...; of a dead one what it did last."""
    step: int
    total: int
    seconds_per_step: float | None = None
    eta: float | None = None
    """Until the last step; only of a running one."""
    silent: float | None = None
    """Since the last heartbeat."""
    waiting: float | None = None
    """Since the last step; only of a running one."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Of the last step: losses, gradient norm, learning rate."""
    heldout: Mapping[str, float] = field(default_factory=dict)
    memory: Mapping[str, object] = field(default_factory=dict)
    """`place`, and in bytes `now`, `peak`, `limit`."""
    checkpoint: str = ""
    """The last one's folder, below the run's."""
    next_checkpoint: int | None = None
    sample: str = ""
    """The last one's file, below the run's."""
    reason: str = ""
    """Why it failed."""
    model: str = ""
    started: str = ""
    pid: int | None = None
    host: str = ""

    def as_json(self) -> dict[str, object]:
        """All fields, the path as text."""
        return {**asdict(self), "path": str(self.path)}


def read_status(folder: Path, now: datetime | None = None, host: str = "") -> RunStatus:
    """The state of the run in `folder`. `now`, `host`: of the observer; found out when not given. Needs no more than reading."""
    files = RunFiles(folder)
    beat, run, events = files.json(HEARTBEAT), files.json(RUN), _Events(files)
    moment, host = now or datetime.now(UTC), host or socket.gethostname()
    silent = _since(beat.get("time"), moment)
    last = beat.get("state") if beat else events.latest  # a heartbeat that is lost, or torn by a copy, says nothing
    state = FINAL.get(text(last)) or ("running" if _alive(beat, silent, host) else "died")
    step, total = int(number(beat.get("step")) or 0), int(number(beat.get("total")) or 0)
    pace = number(beat.get("seconds_per_step"))
    running = state == "running"
    doing = text(beat.get("state"), "starting")
    return RunStatus(
        name=folder.resolve().name, path=folder, state=state, doing=doing, step=step, total=total, seconds_per_step=pace,
        eta=pace * (total - step) if running and pace is not None else None, silent=silent,
        waiting=_since(beat.get("stepped"), moment) if running else None,
        metrics=_numbers(beat.get("metrics") or files.last_row(METRICS)), heldout=_numbers(events.last("heldout").get("losses")),
        memory=mapping(beat.get("memory")), checkpoint=text(events.last("checkpoint").get("path")),
        next_checkpoint=_next_checkpoint(files, step, total) if running else None, sample=text(events.last("sample").get("path")),
        reason=text(events.last("failed").get("reason")) if state == "failed" else "",
        model=" ".join(filter(None, [text(run.get("family")), text(run.get("variant"))])), started=text(run.get("started")),
        pid=int(number(beat.get("pid")) or 0) or None, host=text(beat.get("host")),
    )  # fmt: skip


class _Events:
    """The last event of each kind."""

    def __init__(self, files: RunFiles) -> None:
        self._last: dict[str, Row] = {}
        self.latest = ""
        """Kind of the last one."""
        for row in files.events():
            self.latest = text(row.get("kind"))
            self._last[self.latest] = row

    def last(self, kind: str) -> Row:
        """Empty where there is none."""
        return self._last.get(kind, {})


def _alive(beat: Row, silent: float | None, host: str) -> bool:
    """Whether the process that wrote `beat` still runs; on another machine whether it was heard of lately."""
    pid = number(beat.get("pid"))
    if pid is None or silent is None:
        return False
    if beat.get("host") != host:
        return silent <= SILENT
    try:
        born = psutil.Process(int(pid)).create_time()
        ended = psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
    began = _moment(beat.get("started")) or _moment(beat.get("time"))
    # A later process may have got the same number; the one that wrote the heartbeat was there before it.
    return not ended and (began is None or born <= began.timestamp() + ROUNDING)


def _next_checkpoint(files: RunFiles, step: int, total: int) -> int | None:
    interval = int(number(mapping(files.json(CONFIG).get("checkpoint_step_interval")).get("value")) or 0)
    return min(total, (step // interval + 1) * interval) if interval else total or None


def _moment(value: object) -> datetime | None:
    try:
        found = datetime.fromisoformat(text(value))
    except ValueError:
        return None
    return found if found.tzinfo else found.replace(tzinfo=UTC)


def _since(value: object, now: datetime) -> float | None:
    """Seconds; 0 where clocks of two machines disagree."""
    found = _moment(value)
    return None if found is None else max(0.0, (now - found).total_seconds())


def _numbers(value: object) -> dict[str, float]:
    """The numbers of an object, without the step and the losses of single bands of noise."""
    found = {name: number(entry) for name, entry in mapping(value).items() if name != "step" and name.count("/") < 2}
    return {name: entry for name, entry in found.items() if entry is not None}
