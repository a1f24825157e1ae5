"""Signals as requests that the loop answers between two steps, so that a stop never tears a step or a checkpoint."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType

EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
_EXIT_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED}


class StopRequests:
    """Collects SIGINT, SIGTERM and SIGUSR1 while it is entered, and puts the former handlers back afterwards.

    `stop`: 0, or the exit code to end with after saving (130 for SIGINT, 143 for SIGTERM). The same signal once more ends the
    process now: as KeyboardInterrupt or SystemExit(143), so that the terminal and temporary files are left in order; the
    one after that meets the system's own handler, which needs no Python to run. `checkpoint_now`: SIGUSR1 arrived.
    `notify` is told in words what happens, at once, since a step may take long. Python allows handlers in the main thread
    only; in any other thread this does nothing.

    `most`: for a run of several processes, gives the largest of each value over all of them. Requests then count from the next `agree`
    on, which all processes call after the same step; so none stops while another waits for its gradients.
    """

    def __init__(
        self, notify: Callable[[str], None] | None = None, most: Callable[[Sequence[int]], Sequence[int]] | None = None
    ) -> None:
        self.stop = 0
        self.checkpoint_now = False
        self._notify = notify
        self._most = most
        self._asked = 0
        self._asked_checkpoint = False
        self._seen: set[int] = set()
        self._former: dict[signal.Signals, Callable[[int, FrameType | None], object] | int | None] = {}

    @property
    def asked(self) -> bool:
        """Whether this process was asked to stop, agreed upon or not: for who can leave work undone that no other process waits for."""
        return bool(self.stop or self._asked)

    def take_checkpoint_request(self) -> bool:
        """Whether a checkpoint was asked for since the last call; clears the request."""
        self.agree()
        requested = self.checkpoint_now
        self.checkpoint_now = False
        return requested

    def agree(self) -> None:
        """Makes the requests of every process those of all. Does nothing for a single process."""
        if self._most is None:
            return
        asked, checkpoint = self._most([self._asked, int(self._asked_checkpoint)])
        self.stop = self.stop or asked
        self._asked_checkpoint = False
        self.checkpoint_now = self.checkpoint_now or bool(checkpoint)

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in _EXIT_CODES:
                self._former[number] = signal.signal(number, self._on_stop)
            self._former[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._on_checkpoint)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._former.items():
            # None: the handler before was not installed from Python and cannot be put back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._former.clear()

    def _on_stop(self, number: int, frame: FrameType | None) -> None:
        if number in self._seen:
            signal.signal(number, signal.SIG_DFL)
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(EXIT_TERMINATED)
        self._seen.add(number)
        self._asked = self._asked or _EXIT_CODES[signal.Signals(number)]
        if self._most is None:
            self.stop = self._asked
        self._tell(f"{signal.Signals(number).name}: finishing this step, then saving; send it again to exit now without saving")

    def _on_checkpoint(self, number: int, frame: FrameType | None) -> None:
        self._asked_checkpoint = True
        if self._most is None:
            self.checkpoint_now = True
        self._tell("SIGUSR1: saving a checkpoint after this step")

    def _tell(self, text: str) -> None:
        if self._notify is not None:
            self._notify(text)


@contextmanager
def before_training(notify: Callable[[str], None]) -> Iterator[None]:
    """While clips are encoded and the model is loaded, when there is no step to finish and nothing to save: SIGTERM ends the run in order,
    with exit code 143, and SIGUSR1 is answered with a word, where unhandled it would end the process. Other threads: nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        notify("SIGTERM: ending before the first step; what was encoded is kept")
        raise SystemExit(EXIT_TERMINATED)

    def decline(number: int, frame: FrameType | None) -> None:
        notify("SIGUSR1: no step has run yet, so there is nothing to save")

    former = {number: signal.signal(number, handler) for number, handler in ((signal.SIGTERM, end), (signal.SIGUSR1, decline))}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
