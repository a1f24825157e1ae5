"""A command in a process of its own on a real pseudo-terminal: what it asks is waited for, answers are typed."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from core.screen import Screen
from integration.processes import Launcher

PATIENCE = 60.0
"""Seconds until a text that does not come is a failure; several processes share the machine."""
PROGRAM = """
import fcntl, signal, termios
signal.signal(signal.SIGINT, signal.default_int_handler)
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from tuner.cli.main import main
main()
"""
"""Makes the terminal the one whose Ctrl-C reaches the process, then runs the command."""


class Typed:
    """What is on the other side of a pseudo-terminal."""

    def __init__(self, own: int) -> None:
        self._own = own
        self.seen = ""
        """All that was shown, without carriage returns."""
        self.raw = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._read = 0

    def wait_for(self, text: str) -> str:
        """Waits until `text` (a pattern) is shown after what was waited for before; gives what came up to there."""
        deadline = time.monotonic() + PATIENCE
        while not (found := re.compile(text).search(self.seen, self._read)):
            assert self._receive(deadline), f"{text!r} was not shown:\n{self.seen[self._read:]}"
        passed = self.seen[self._read : found.end()]
        self._read = found.end()
        return passed

    def answer(self, question: str, text: str) -> str:
        """Waits for a question, types a line, gives what was shown before."""
        passed = self.wait_for(question)
        self.type(text + "\n")
        return passed

    def type(self, keys: str) -> None:
        """Presses keys; "\\x03" is Ctrl-C, "\\x04" Ctrl-D."""
        os.write(self._own, keys.encode())

    def hang_up(self) -> None:
        """Closes the terminal's window, so to say: whoever has it as theirs gets SIGHUP, and nothing can be written to it any more."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, self._own)
        os.close(nowhere)

    def read_all(self) -> None:
        """Until the other side is closed."""
        deadline = time.monotonic() + PATIENCE
        while self._receive(deadline):
            continue

    def _receive(self, deadline: float) -> bool:
        """Whether there was something to read."""
        ready, _, _ = select.select([self._own], [], [], max(0.0, deadline - time.monotonic()))
        try:
            came = self._decoder.decode(os.read(self._own, 65536)) if ready else ""
        except OSError:  # Linux says so when the other side is closed
            return False
        self.raw += came
        self.seen += came.replace("\r", "")
        return bool(came)


class TypedCommand(Typed):
    """`tuner ARGUMENTS` on a terminal without a cursor; a context manager."""

    def __init__(self, *arguments: str, folder: Path, environment: Mapping[str, str] = {}) -> None:
        own, theirs = pty.openpty()
        variables = {**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=variables,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        super().__init__(own)

    def __enter__(self) -> TypedCommand:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._own)

    def end(self) -> int:
        """Waits for the end; its exit code."""
        self.read_all()
        return self.process.wait(PATIENCE)


class ForkedCommand(Typed):
    """The same by the launcher, in the working folder, on a terminal with a cursor and so many columns; a context manager."""

    def __init__(self, launcher: Launcher, *arguments: object, columns: int, environment: Mapping[str, str] = {}) -> None:
        own, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        variables = {"TERM": "xterm", "NO_COLOR": "1", "COLUMNS": "", "CI": "", **environment}
        self._launcher, self._columns = launcher, columns
        self._code: int | None = None
        self._pid = launcher.start(arguments, Path(os.devnull), terminal=os.ttyname(theirs), **variables)
        os.close(theirs)
        super().__init__(own)

    def __enter__(self) -> ForkedCommand:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._code is None:
            os.kill(self._pid, signal.SIGKILL)
            self._launcher.wait(self._pid)
        os.close(self._own)

    def end(self) -> int:
        """Waits for the end; its exit code."""
        self.read_all()
        self._code = self._launcher.wait(self._pid)
        return self._code

    def lines(self) -> list[str]:
        """What the screen shows, were it high enough. A line that the terminal had to break is an error."""
        screen = Screen(self._columns)
        screen.write(self.raw)
        return [line.rstrip() for line in screen.lines]
