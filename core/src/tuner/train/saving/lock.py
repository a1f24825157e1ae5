"""One process per run folder. The lock is the kernel's, so it goes with its holder, however that one ends."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from tuner.errors import ConfigError, DiskError

LOCK_NAME = ".lock"


class FolderLock:
    """An exclusive `flock` on `<folder>/.lock`, whose text names the holder: `<pid> <host>`.

    The file stays when the lock is released: deleting it would let a third process lock a file that nobody sees any more.
    A forked child shares the lock until it ends, so a worker that outlives its trainer still protects the folder it may write to.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_NAME
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Takes the lock or raises: `ConfigError` naming the holder when it is taken, `DiskError` where there are no locks."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise DiskError(f"the run folder cannot be written: {error.strerror}", where=str(self.path.parent)) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(descriptor, 256, 0).decode("utf-8", "replace").split()
            os.close(descriptor)
            raise self._refusal(error, holder) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
        self._descriptor = descriptor

    def _refusal(self, error: OSError, holder: list[str]) -> ConfigError | DiskError:
        if not isinstance(error, BlockingIOError):
            return DiskError(
                f"this file system has no file locks: {error.strerror}",
                where=str(self.path.parent),
                remedy="set output_dir to a folder on a local disk",
            )
        who = f"process {holder[0]} on {holder[1]}" if len(holder) == 2 else "another process"
        return ConfigError(
            f"another run writes to this folder: {who}",
            where=f"output_dir {self.path.parent}",
            remedy="stop that run, or set another output_dir",
        )

    def release(self) -> None:
        """Gives the lock back; does nothing when it is not held."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FolderLock:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.release()
