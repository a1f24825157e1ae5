"""The run folder: the interface to everybody who watches a run, now or later. Importing this costs no torch.

run.json               what ran: versions, plugins, device
config.resolved.json   every key with its value and origin
events.jsonl           what happened, one object a line
metrics.jsonl          one object per logged step; after a resume exactly what an uninterrupted run would hold
pace.jsonl             speed and memory, about once a second; a resumed run adds to it
heartbeat.json         that it lives, and where it is
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from tuner.config.masking import masked
from tuner.errors import DiskError

Listener = Callable[[str, Mapping[str, object]], None]
"""Is told of an event: its kind and its facts."""


@dataclass(frozen=True)
class RunInfo:
    """What a run is, for event hooks and run.json."""

    folder: Path
    family: str
    variant: str
    settings: Mapping[str, object] = field(default_factory=dict)
    """The resolved options, key -> value."""
    plugins: tuple[tuple[str, str], ...] = ()
    """(distribution, version) of every plugin loaded."""
    started: str = ""
    """ISO time with offset."""
    base_model: str = ""
    """What the run starts from: repository and commit, or a file's name."""


def now() -> str:
    """The time in UTC, ISO 8601, milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def describe_device(kind: str = "") -> str:
    """The accelerator's name, or the processor's. `kind`: the type of the device in use; found out when empty."""
    import torch

    if kind in ("", "cuda") and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return (platform.processor() or platform.machine()) + (f" ({kind})" if kind else "")


class RunFolder:
    """Creates or opens a run folder and writes its files. Raises `DiskError` where it cannot."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.listeners: list[Listener] = []
        """Told of each event after it was written."""
        self._beating, self._replacing = threading.Lock(), threading.Lock()
        self._beat: dict[str, object] = {}
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(
                f"the run folder cannot be made: {error.strerror}", where=f"output_dir {path}", remedy="set another output_dir"
            ) from error

    def write_run(self, info: RunInfo, device: str = "") -> None:
        """run.json. `device`: its name; found out when empty, which imports torch."""
        self._replace("run.json", {
            "family": info.family,
            "variant": info.variant,
            "base_model": info.base_model,
            "started": info.started or now(),
            "pid": os.getpid(),
            "device": device or describe_device(),
            "system": platform.platform(),
            "versions": {"python": platform.python_version(), **_versions("tuner-framework", "torch")},
            "plugins": dict(info.plugins),
            "settings": masked(info.settings),
        })

    def write_config(self, resolved: Mapping[str, Mapping[str, object]]) -> None:
        """config.resolved.json: key -> {"value", "origin"}."""
        entries = {key: {name: masked(fact, key if name == "value" else name) for name, fact in entry.items()}
                   for key, entry in resolved.items()}
        self._replace("config.resolved.json", entries)

    def event(self, kind: str, **facts: object) -> None:
        """One line of events.jsonl: {"time", "kind", ...facts}."""
        self._append("events.jsonl", {"time": now(), "kind": kind, **facts})
        for listener in self.listeners:
            listener(kind, facts)

    def metrics(self, step: int, values: Mapping[str, object]) -> None:
        """One line of metrics.jsonl: {"step", ...values}. No time, so that a resumed run's file equals an uninterrupted one's."""
        self._append("metrics.jsonl", {"step": step, **values})

    def drop_metrics_after(self, step: int) -> int:
        """Removes the rows of metrics.jsonl that belong to steps after `step` (-1: all), at once; returns how many went.

        Called on resume: those steps are run again. A torn line goes too.
        """
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return 0
        lines = path.read_bytes().splitlines(keepends=True)
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            self._replace_bytes("metrics.jsonl", b"".join(kept), durable=True)
        return len(lines) - len(kept)

    def pace(self, step: int, values: Mapping[str, object]) -> None:
        """One line of pace.jsonl: {"time", "step", ...values}."""
        self._append("pace.jsonl", {"time": now(), "step": step, **values})

    def heartbeat(self, step: int, total: int, state: str, facts: Mapping[str, object] | None = None) -> None:
        """heartbeat.json, replaced in one go. `state`: a word such as "training", "saving", "finished". `facts`: what else is known;
        what was given before stays."""
        with self._beating:
            self._beat |= {"step": step, "total": total, "state": state, **masked_facts(facts)}
            self._write_beat()

    def beat_again(self) -> None:
        """The last heartbeat with the present time; for another thread than that which gives heartbeats."""
        with self._beating:  # from reading to writing: else an old one could replace a newer one
            self._write_beat()

    def _write_beat(self) -> None:
        place = {"time": now(), "pid": os.getpid(), "host": socket.gethostname()}
        self._replace("heartbeat.json", {**place, **self._beat}, durable=False)

    def write_dataset(self, facts: Mapping[str, object]) -> None:
        """dataset.json: what is trained on, for the report."""
        self._replace("dataset.json", masked_facts(facts))

    def write_page(self, name: str, text: str) -> None:
        """A page for people, replaced in one go."""
        self._replace_bytes(name, text.encode("utf-8", "backslashreplace"), durable=False)

    def _replace(self, name: str, content: Mapping[str, object], *, durable: bool = True) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
        self._replace_bytes(name, _encoded(text), durable=durable)

    def _replace_bytes(self, name: str, content: bytes, *, durable: bool) -> None:
        """Readers see the old file or the new one, never a part. `durable`: also after a power cut."""
        temporary = self.path / f".{name}.tmp-{os.getpid()}"
        with self._replacing:
            self._replace_with(temporary, name, content, durable=durable)

    def _replace_with(self, temporary: Path, name: str, content: bytes, *, durable: bool) -> None:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(self.path / name)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            raise self._unwritable(name, error) from error

    def _append(self, name: str, content: Mapping[str, object]) -> None:
        """Adds a whole line with one write, after cutting off what a crash may have left of a line.

        Locked, because a write becomes visible page by page: another writer would take the first half for a torn line. A reader
        may still meet that half, so it should leave out a last line without an end.
        """
        line = _encoded(json.dumps(masked(content), ensure_ascii=False, allow_nan=False))
        try:
            descriptor = os.open(self.path / name, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                size = _cut_torn_line(descriptor)
                written = os.write(descriptor, line)
                if written < len(line):
                    os.ftruncate(descriptor, size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            finally:
                os.close(descriptor)
        except OSError as error:
            raise self._unwritable(name, error) from error

    def _unwritable(self, name: str, error: OSError) -> DiskError:
        gone = error.errno == errno.ENOENT
        remedy = "the folder was removed: set another output_dir" if gone else "free some space, or set another output_dir"
        return DiskError(f"cannot be written: {error.strerror}", where=str(self.path / name), remedy=remedy)


def masked_facts(facts: Mapping[str, object] | None) -> dict[str, object]:
    """Facts as JSON can hold them, without secrets."""
    return {name: masked(value, name) for name, value in (facts or {}).items()}


def _versions(*distributions: str) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _encoded(text: str) -> bytes:
    """A line of JSON. Names of files that are not UTF-8, which Python holds as lone surrogates, become escapes that JSON reads back."""
    return f"{text}\n".encode("utf-8", "backslashreplace")


def _step_of(line: bytes) -> float:
    """The step of a row; infinity for a line that is no whole row, so that it is dropped."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError):
        return math.inf


def _cut_torn_line(descriptor: int) -> int:
    """Shortens the file to its last whole line; returns its size in bytes."""
    size = os.fstat(descriptor).st_size
    end = size
    while end and os.pread(descriptor, 1, end - 1) != b"\n":
        end -= 1
    if end < size:
        os.ftruncate(descriptor, end)
    return end
