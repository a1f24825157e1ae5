"""Signals as requests that the loop answers between two steps, so that a stop never tears a step or a checkpoint."""

from __future__ import annotations

import errno
import os
import signal
import termios
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType

EXIT_HUNG_UP = 129
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143
_EXIT_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED, signal.SIGHUP: EXIT_HUNG_UP}


class StopRequests:
    """Collects SIGINT, SIGTERM, SIGHUP and SIGUSR1 while it is entered, and puts the former handlers back afterwards.

    `stop`: 0, or the exit code to end with after saving (130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP). The same signal once more ends
    the process now: as KeyboardInterrupt or SystemExit(143), so that the terminal and temporary files are left in order; the
    one after that meets the system's own handler, which needs no Python to run. `checkpoint_now`: SIGUSR1 arrived.
    SIGHUP comes when the terminal goes, often from the system and the shell both: only the first counts, and what is written to that
    terminal from then on is dropped. Under `nohup`, which has it ignored, it stays ignored.
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
            for number in _heeded(*_EXIT_CODES):
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
        if number == signal.SIGHUP:
            signal.signal(number, signal.SIG_IGN)
            _leave_terminal()
        self._seen.add(number)
        self._asked = self._asked or _EXIT_CODES[signal.Signals(number)]
        if self._most is None:
            self.stop = self._asked
        again = "" if number == signal.SIGHUP else "; send it again to exit now without saving"
        self._tell(f"{signal.Signals(number).name}: finishing this step, or sample, then saving{again}")

    def _on_checkpoint(self, number: int, frame: FrameType | None) -> None:
        self._asked_checkpoint = True
        if self._most is None:
            self.checkpoint_now = True
        self._tell("SIGUSR1: saving a checkpoint after this step")

    def _tell(self, text: str) -> None:
        if self._notify is not None:
            self._notify(text)


def _heeded(*numbers: signal.Signals) -> list[signal.Signals]:
    """Those that whoever started this process has not asked it to ignore; of SIGHUP alone that is asked."""
    return [number for number in numbers if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN]


def _leave_terminal() -> None:
    """Output to a terminal that is gone would raise."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        with suppress(OSError):  # it may be closed
            if os.isatty(descriptor) or not _is_open(descriptor):
                os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _is_open(descriptor: int) -> bool:
    """Not so: a terminal that has hung up, of which even its settings cannot be read."""
    try:
        termios.tcgetattr(descriptor)
    except termios.error as error:
        return bool(error.args[0] != errno.EIO)
    return True


@contextmanager
def before_training(notify: Callable[[str], None]) -> Iterator[None]:
    """While clips are encoded and the model is loaded, when there is no step to finish and nothing to save: SIGTERM and SIGHUP end the run
    in order, with exit code 143 or 129, and SIGUSR1 is answered with a word: unhandled it would end the process. Other threads: nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.SIG_IGN)
        if number == signal.SIGHUP:
            _leave_terminal()
        notify(f"{signal.Signals(number).name}: ending before the first step; what was encoded is kept")
        raise SystemExit(_EXIT_CODES[signal.Signals(number)])

    def decline(number: int, frame: FrameType | None) -> None:
        notify("SIGUSR1: no step has run yet, so there is nothing to save")

    handlers = {number: end for number in _heeded(signal.SIGTERM, signal.SIGHUP)} | {signal.SIGUSR1: decline}
    former = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
