"""Remembers what was measured of each file, by its size and times, so that a second start reads no clip again."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from tuner.data.container import MediaFacts, probe

log = logging.getLogger(__name__)

INDEX_VERSION = 2
"""Raised when the same file would give other facts."""
INDEX_NAME = "media-index.json"
CLOCKS = 2.0
"""Seconds by which a file's clock may be behind this machine's."""


@dataclass(frozen=True)
class Examined:
    """A file's content and what is in it."""

    content: str
    """sha256 of the whole file."""
    facts: MediaFacts


def examine(path: Path) -> Examined:
    """Probes and hashes; for a worker process. Raises `MediaError`."""
    facts = probe(path)
    with path.open("rb") as file:
        return Examined(hashlib.file_digest(file, "sha256").hexdigest(), facts)


class MediaIndex:
    """The index file of one cache folder. Losing it costs time only; paths are kept as digests."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / INDEX_NAME
        self._rows: dict[str, dict[str, object]] = self._read()
        self._changed = False

    def _read(self) -> dict[str, dict[str, object]]:
        try:
            content = json.loads(self._file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            log.warning("%s cannot be read and is made anew: %s", self._file, error)
            return {}
        fits = isinstance(content, dict) and content.get("version") == INDEX_VERSION
        return dict(content["files"]) if fits else {}

    def find(self, path: Path) -> Examined | None:
        """What is known of the file as it is now."""
        row = self._rows.get(_name(path))
        try:
            if row is None or row["stamp"] != _stamp(path):
                return None
        except OSError:  # a link whose target has gone
            return None
        return Examined(str(row["content"]), MediaFacts(**row["facts"]))  # type: ignore[arg-type]

    def add(self, path: Path, examined: Examined) -> None:
        """Kept until `save`."""
        self._rows[_name(path)] = {"stamp": _stamp(path), "content": examined.content, "facts": asdict(examined.facts)}
        self._changed = True

    def save(self) -> None:
        """Atomic. A folder that cannot be written is no error: the index is a convenience."""
        if not self._changed:
            return
        temporary = self._file.with_name(f".{INDEX_NAME}.{uuid.uuid4().hex}")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps({"version": INDEX_VERSION, "files": self._rows}), encoding="utf-8")
            temporary.replace(self._file)
        except OSError as error:
            log.warning("%s cannot be written: %s", self._file, error)


def _name(path: Path) -> str:
    return hashlib.sha256(os.path.realpath(path).encode("utf-8", "surrogateescape")).hexdigest()


def is_still(path: Path, content: str) -> bool:
    """Whether a file has the content (its sha256) that it was examined with in this process or before it. False where it is gone.

    It is read again only if something happened to it since this process began.
    """
    began = psutil.Process().create_time() - CLOCKS
    try:
        status = path.stat()
        if max(status.st_mtime, status.st_ctime) < began:
            return True
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == content
    except OSError:
        return False


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    # A file that was put in another's place may have its size and time; that it was changed here is told by the third.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
