"""Reads a run folder as it is, while it is written to or long after. Files that are missing or half written are no errors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import ConfigError

RUN, CONFIG, EVENTS, METRICS = "run.json", "config.resolved.json", "events.jsonl", "metrics.jsonl"
PACE, HEARTBEAT, DATASET, REPORT = "pace.jsonl", "heartbeat.json", "dataset.json", "report.html"
DEEPEST = 3
"""Levels below a folder where runs are looked for."""
TAIL = 65536
"""Bytes at the end of a file in which its last line is looked for."""

Row = dict[str, object]


@dataclass(frozen=True)
class RunFiles:
    """The files of one run folder, read on demand."""

    path: Path

    def json(self, name: str) -> Row:
        """The object in a file; empty where there is none that can be read."""
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def rows(self, name: str) -> Iterator[Row]:
        """The objects of a file of lines, without those that are not whole."""
        try:
            with (self.path / name).open("rb") as file:
                yield from (row for line in file if (row := _row(line)) is not None)
        except OSError:
            return

    def last_row(self, name: str) -> Row:
        """The last whole object of a file of lines; empty where there is none."""
        try:
            with (self.path / name).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                lines = file.readlines()
        except OSError:
            return {}
        return next((row for line in reversed(lines) if (row := _row(line)) is not None), {})

    def events(self) -> list[Row]:
        """Events since the run began anew for the last time, oldest first: a folder may have been used before, and not resumed from."""
        found = list(self.rows(EVENTS))
        begins = [index for index, row in enumerate(found) if row.get("kind") == "training" and row.get("from_step") == 0]
        if not begins:
            return found
        opened = [index for index in range(begins[-1]) if found[index].get("kind") == "started"]
        return found[opened[-1] if opened else begins[-1] :]


def _row(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        content = json.loads(line)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def is_run(folder: Path) -> bool:
    """Whether a training has written its files there."""
    return (folder / RUN).is_file() and (folder / EVENTS).is_file()


def find_runs(folder: Path) -> list[Path]:
    """`folder` itself if it is a run, else the runs at most `DEEPEST` levels below it, by path. Raises `ConfigError` for none.

    Hidden folders and links are not looked into, nor the inside of a run.
    """
    if not folder.is_dir():
        raise ConfigError("there is no such folder", where="RUN", value=str(folder), remedy="name the output_dir of a run")
    found = list(_runs(folder, DEEPEST))
    if not found:
        raise ConfigError(
            f"there is no run in this folder, nor {DEEPEST} levels below it", where="RUN", value=str(folder),
            remedy="name the output_dir of a run: it holds run.json and events.jsonl",
        )  # fmt: skip
    return found


def one_run(folder: Path) -> RunFiles:
    """The run in `folder`, or the only one below it. Raises `ConfigError` for none, and for several."""
    found = find_runs(folder)
    if len(found) > 1:
        names = ", ".join(str(path) for path in found[:5]) + (", ..." if len(found) > 5 else "")
        raise ConfigError(f"there are {len(found)} runs below this folder: {names}", where="RUN", value=str(folder), remedy="name one")
    return RunFiles(found[0])


def _runs(folder: Path, depth: int) -> Iterator[Path]:
    if is_run(folder):
        yield folder
        return
    if not depth:
        return
    try:
        below = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False))
    except OSError:
        return
    for name in below:
        if not name.startswith("."):
            yield from _runs(folder / name, depth - 1)


def text(value: object, otherwise: str = "") -> str:
    """`value` where it is text."""
    return value if isinstance(value, str) else otherwise


def number(value: object) -> float | None:
    """`value` where it is a number."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def mapping(value: object) -> Row:
    """`value` where it is an object."""
    return value if isinstance(value, dict) else {}


def rows(value: object) -> list[Row]:
    """The objects in `value` where it is a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
