"""Writes records in threads, so that the encoder goes on while the disk works."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Final

from tuner.data.records import Place
from tuner.interfaces.encoders import Record

THREADS: Final = 2
"""One computes checksums while the other waits for the disk."""
WAITING: Final = 16
"""Records that are not written yet, at most; the largest ones, of captions, have 16 MB."""


class RecordWriter:
    """Use as a context manager: leaving it waits until everything is written. Each record is there whole, or not at all.

    What goes wrong is raised by the next `write`, or on leaving; after it nothing more is taken.
    """

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(THREADS, "records")
        self._room = threading.BoundedSemaphore(WAITING)
        self._error: BaseException | None = None

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown()
        if value is None:
            self._raise()

    def write(self, place: Place, record: Record) -> None:
        """Takes the record, whose tensors nobody may change any more; waits where too many are waiting.

        Raises the `DiskError` of one before.
        """
        self._room.acquire()
        try:
            self._raise()
            done = self._threads.submit(place.cache.write, place.key, record)
        except BaseException:
            self._room.release()
            raise
        done.add_done_callback(self._written)

    def _written(self, done: Future[None]) -> None:
        self._error = self._error or done.exception()
        self._room.release()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
