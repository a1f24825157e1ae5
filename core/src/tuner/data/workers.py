"""Worker processes for decoding: a decoder that hangs or dies costs one clip, not the run.

Each worker works on one clip at a time over a pipe of its own, so that exactly the worker that is stuck is ended, and replaced.

Special here: workers are interpreters of their own, started all at once, and not multiprocessing's. Those read the program's main module
again, one after the other: where that imports torch, decoding began after half a minute, and a program without a guard around its main
part could not decode at all.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, TypeVar

from tuner.data.container import DecoderFailed
from tuner.errors import DataError, EnvironmentProblem, TunerError

T = TypeVar("T")
MOST_WORKERS = 4
"""Decoding hides behind encoding long before this."""
GLANCE = 0.2
"""Seconds after which a waiting `map` looks whether it is to stop."""
START_SECONDS = 120.0
"""A process that has not come up by then never will."""


def serve(number: int) -> None:
    """A worker's loop, until the other side ends. `number`: the file descriptor of its pipe.

    An exception that is no `TunerError` ends the process, which the other side reports.
    """
    pipe = Connection(number)
    with suppress(OSError):
        pipe.send("ready")
    while True:
        try:
            function, arguments = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            reply: tuple[object, TunerError | None] = (function(*arguments), None)
        except TunerError as error:
            reply = (None, error)
        except MemoryError:
            reply = (None, DecoderFailed("there is not enough host memory to decode it", where=str(arguments[0])))
        with suppress(OSError):
            pipe.send(reply)


class _Worker:
    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        number = theirs.fileno()
        try:
            self.process = subprocess.Popen([sys.executable, "-P", "-c", _program(number)], stdin=subprocess.DEVNULL, pass_fds=(number,))
        except OSError as error:
            self.pipe.close()
            raise _cannot_start(error) from error
        finally:
            theirs.close()
        self.ready = False
        # One that hangs would not see that this process has ended.
        self._at_exit = weakref.finalize(self, _kill, self.process)

    def begin(self) -> None:
        """Takes its first word. Raises `EnvironmentProblem` where there is none."""
        with suppress(EOFError, OSError):
            self.ready = self.pipe.recv() == "ready"
        if not self.ready:
            self.end()
            raise _cannot_start()

    def end(self) -> None:
        self._at_exit()
        self.pipe.close()


def _program(number: int) -> str:
    """Of a worker whose pipe has that file descriptor. Ctrl-C goes to the whole process group; the run decides what happens."""
    ignore = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN)"
    return f"{ignore}; sys.path[:] = {sys.path!r}; from tuner.data import workers; workers.serve({number})"


def _kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _cannot_start(error: OSError | None = None) -> EnvironmentProblem:
    what = "worker processes for decoding cannot start"
    if error is None:
        return EnvironmentProblem(what, where="decoding", remedy="see what the process itself has said")
    return EnvironmentProblem(f"{what}: {error}", where="decoding", remedy="end other programs, or ask for more processes")


@dataclass(frozen=True)
class _Job:
    index: int
    worker: _Worker
    deadline: float
    where: str


class DecodeWorkers:
    """A few processes, started at first use. Use as a context manager, or call `close`.

    `timeout`: seconds that one clip may take.
    """

    def __init__(self, count: int | None = None, timeout: float = 600.0) -> None:
        self._count = count or min(MOST_WORKERS, os.cpu_count() or 1)
        self._timeout = timeout
        self._idle: list[_Worker] = []
        self._stopping = threading.Event()

    def __enter__(self) -> DecodeWorkers:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the processes."""
        while self._idle:
            self._idle.pop().end()

    def stop(self) -> None:
        """Makes a `map` that another thread is waiting in end early, whatever its decoders are doing."""
        self._stopping.set()

    def map(self, function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], most: int | None = None) -> Iterator[T | DataError]:
        """`function(*task)` for each task, in order, some tasks ahead of the consumer. Failures of a clip come as `DataError`.

        `function` and arguments must be picklable, the first argument names the clip. `most`: results at most, finished or being made, that
        nobody has taken yet. Raises other `TunerError`s.
        """
        self._stopping.clear()  # now: a `stop` may come before the first result is asked for
        return self._map(function, tasks, most)

    def _map(self, function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], most: int | None) -> Iterator[T | DataError]:
        most = max(1, most or 2 * self._count)
        todo = enumerate(tasks)
        jobs: dict[Connection, _Job] = {}
        done: dict[int, T | DataError] = {}
        upcoming = 0
        exhausted = False
        try:
            while not self._stopping.is_set():
                while not exhausted and len(jobs) < self._count and len(jobs) + len(done) < most:
                    if (item := next(todo, None)) is None:
                        exhausted = True
                        break
                    job = self._start(item[0], function, item[1])
                    jobs[job.worker.pipe] = job
                self._collect(jobs, done)
                while upcoming in done:
                    yield done.pop(upcoming)
                    upcoming += 1
                if exhausted and not jobs and not done:
                    return
        finally:
            for job in jobs.values():
                job.worker.end()

    def _start(self, index: int, function: Callable[..., T], task: tuple[Any, ...]) -> _Job:
        worker = self._worker()
        with suppress(OSError):  # its end is seen where its answer is waited for
            worker.pipe.send((function, task))
        limit = self._timeout if worker.ready else START_SECONDS
        return _Job(index, worker, time.monotonic() + limit, str(task[0]))

    def _worker(self) -> _Worker:
        """One that has nothing to do and has not ended meanwhile, or a new one."""
        while self._idle:
            worker = self._idle.pop()
            if worker.process.poll() is None:
                return worker
            worker.end()
        return _Worker()

    def _collect(self, jobs: dict[Connection, _Job], done: dict[int, T | DataError]) -> None:
        """Waits for an answer, a death or a deadline."""
        if not jobs:
            return
        rest = min(GLANCE, min(job.deadline for job in jobs.values()) - time.monotonic())
        # Answers are taken before deadlines are looked at: the consumer may have been busy for longer than that.
        answered = set(wait(list(jobs), max(0.0, rest)))
        for pipe in [pipe for pipe in jobs if pipe in answered]:
            job = jobs.pop(pipe)
            if job.worker.ready:
                done[job.index] = self._receive(job)
            else:
                job.worker.begin()
                jobs[pipe] = replace(job, deadline=time.monotonic() + self._timeout)
        for pipe, job in list(jobs.items()):
            if time.monotonic() > job.deadline and not pipe.poll():
                del jobs[pipe]
                job.worker.end()
                if not job.worker.ready:
                    raise _cannot_start()
                done[job.index] = DecoderFailed(f"decoding did not end within {self._timeout:g} seconds", where=job.where)

    def _receive(self, job: _Job) -> Any:
        try:
            value, error = job.worker.pipe.recv()
        except (EOFError, OSError):
            with suppress(subprocess.TimeoutExpired):
                job.worker.process.wait(START_SECONDS)
            code = job.worker.process.returncode
            job.worker.end()
            hint = ", perhaps because the machine ran out of memory" if code == -signal.SIGKILL else ""
            return DecoderFailed(f"the decoder died (exit code {code}{hint})", where=job.where)
        self._idle.append(job.worker)
        if isinstance(error, DataError):
            return error
        if error is not None:
            raise error
        return value


def in_worker(workers: DecodeWorkers, function: Callable[..., T], *arguments: Any) -> T:
    """One call in a worker process. Raises the clip's `DataError`."""
    for result in workers.map(function, [arguments]):
        if isinstance(result, DataError):
            raise result
        return result
    raise AssertionError("one task gives one result")
