"""A command in a process of its own on a real pseudo-terminal: what it asks is waited for, answers are typed."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

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


class TypedCommand:
    """`tuner ARGUMENTS` on a terminal; a context manager."""

    def __init__(self, *arguments: str, folder: Path, environment: Mapping[str, str] = {}) -> None:
        self._own, theirs = pty.openpty()
        variables = {**os.environ, "TERM": "dumb", "NO_COLOR": "1", "COLUMNS": "200", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *arguments], stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=variables,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        self.seen = ""
        self._read = 0

    def __enter__(self) -> TypedCommand:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self._own)

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

    def end(self) -> int:
        """Waits for the end; its exit code."""
        deadline = time.monotonic() + PATIENCE
        while self._receive(deadline):
            continue
        return self.process.wait(PATIENCE)

    def _receive(self, deadline: float) -> bool:
        """Whether there was something to read."""
        ready, _, _ = select.select([self._own], [], [], max(0.0, deadline - time.monotonic()))
        try:
            came = os.read(self._own, 65536) if ready else b""
        except OSError:  # Linux says so when the other side is closed
            came = b""
        self.seen += came.decode(errors="replace").replace("\r", "")
        return bool(came)
