"""Prepares what comes next in a thread, so that the step never waits for data."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Makes `make(start_step)`, `make(start_step + 1)`, ... in a thread, at most `depth` ahead, and hands them out in order.

    `depth` 0: no thread, each is made when asked for. An exception of `make` is raised where that step is asked for.
    """

    def __init__(self, make: Callable[[int], T], start_step: int = 0, depth: int = 2, stop_step: int | None = None) -> None:
        self._make = make
        self._step = start_step
        self._stop_step = stop_step
        self._ready: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue(max(1, depth))
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if depth > 0:
            self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
            self._thread.start()

    def __enter__(self) -> Prefetcher[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __iter__(self) -> Prefetcher[T]:
        return self

    def __next__(self) -> T:
        """The next one in order. Raises `StopIteration` at `stop_step`, RuntimeError after `close`."""
        if self._closed.is_set():
            raise RuntimeError("the prefetcher is closed")
        if self._thread is None:
            if self._step == self._stop_step:
                raise StopIteration
            self._step += 1
            return self._make(self._step - 1)
        value, error = self._ready.get()
        if error is not None:
            self.close()
            raise error
        return value  # type: ignore[return-value]

    def close(self) -> None:
        """Ends the thread; waits for the one it is making."""
        self._closed.set()
        while self._thread is not None and self._thread.is_alive():
            self._drain()
            self._thread.join(0.05)

    def _drain(self) -> None:
        try:
            while True:
                self._ready.get_nowait()
        except queue.Empty:
            return

    def _run(self) -> None:
        step = self._step
        while not self._closed.is_set():
            if step == self._stop_step:
                self._ready.put((None, StopIteration()))
                return
            try:
                value = self._make(step)
            except BaseException as error:  # raised again where the step is asked for
                self._ready.put((None, error))
                return
            self._ready.put((value, None))
            step += 1
