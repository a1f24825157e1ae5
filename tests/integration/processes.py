"""Commands in processes of their own, for what cannot be tested in this one: being killed, and several ranks.

One launcher imports the libraries once and forks a process per command, which takes a hundredth of a start. It never trains itself:
autograd's threads do not survive a fork. As a program, this file is the launcher.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

KILL_AT = "KILL_AT"
"""`text:n`: the process kills itself with SIGKILL before it opens a file whose path contains `text` for the n-th time."""


class Launcher:
    """Starts commands; a context manager."""

    def __init__(self) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __enter__(self) -> Launcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        assert self._process.wait() == 0

    def start(self, arguments: Sequence[object], log: Path, *, terminal: str = "", **environment: str) -> int:
        """Runs `tuner <arguments>` in this process's working folder; returns its process id. Output goes to `log`.

        `terminal`: the name of a pseudo-terminal's other side, which takes the place of `log` and whose Ctrl-C reaches the command.
        """
        return self._ask({
            "arguments": [str(argument) for argument in arguments], "log": str(log.absolute()), "folder": str(Path.cwd()),
            "environment": environment, "terminal": terminal,
        })  # fmt: skip

    def wait(self, pid: int) -> int:
        """Its exit code; minus the signal's number where one ended it."""
        return self._ask({"wait": pid})

    def _ask(self, question: Mapping[str, object]) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


def _serve() -> None:
    import torch

    import tuner.train.session  # noqa: F401
    import tuner_ltxvideo2.family  # noqa: F401
    from tuner.cli.main import run

    torch.set_num_threads(1)
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])
        else:
            # Open on this side before anybody is told: a terminal that nobody holds any more is gone.
            terminal = os.open(question["terminal"], os.O_RDWR | os.O_NOCTTY) if question["terminal"] else None
            answer = os.fork()
            if answer == 0:
                _become(question, terminal)
                code = run(question["arguments"])
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
            if terminal is not None:
                os.close(terminal)
        print(answer, flush=True)


def _become(question: Mapping[str, object], terminal: int | None) -> None:
    """Input, output, folder and environment of the command."""
    if terminal is None:
        log = os.open(str(question["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        streams = (os.open(os.devnull, os.O_RDONLY), log, log)
    else:
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        streams = (terminal, terminal, terminal)
        for stream in (sys.stdout, sys.stderr):
            assert isinstance(stream, io.TextIOWrapper)
            stream.reconfigure(line_buffering=True)
    for number, stream_file in enumerate(streams):
        os.dup2(stream_file, number)
    os.chdir(str(question["folder"]))
    environment = question["environment"]
    assert isinstance(environment, dict)
    os.environ.update(environment)
    if environment.get(KILL_AT):
        _kill_at(*environment[KILL_AT].rsplit(":", 1))


def _kill_at(text: str, count: str) -> None:
    left = int(count)

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal left
        if event == "open" and text in str(arguments[0]):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


if __name__ == "__main__":
    _serve()
