"""Streamed blocks that lie on disk: a safetensors file a block, read ahead of need by a thread of its own.

The files are scratch: written anew by every session into a folder of its own, removed when it detaches, and by the next session in the same
place where a process was killed (its lock on the folder went with it). Modules hold memory-mapped tensors between passes, so that what is
written into those (a merge, full weights) reaches the file and with it the device.

The thread reads into one of two staging buffers while the other is being copied to the device. Computation that needs a unit waits on the
host until the thread has issued its copy, so such a step cannot be captured as a graph.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from tuner.errors import DiskError
from tuner_offload.arena import HostArena, Parcel
from tuner_offload.ring import Feed
from tuner_offload.streamed import Layout, Store
from tuner_offload.transfer import Copies, Link, Slot, log, pageable_notice

KEY = "group_offload_to_disk_path"
LOCK = ".lock"
REMEDY = f"set {KEY} to a folder on a local disk with room for the weights"
STAGING = 2


def folder_problem(path: Path, needed: int) -> list[DiskError]:
    """Why `needed` bytes cannot be kept in `path`; empty where they can. Makes nothing."""
    place = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        return [DiskError("the folder cannot be written", where=KEY, value=str(path), remedy=REMEDY)]
    free = shutil.disk_usage(place).free
    if needed > free:
        problem = f"{needed / 1e9:.1f} GB are needed there, {free / 1e9:.1f} GB are free"
        return [DiskError(problem, where=KEY, value=str(path), remedy=REMEDY)]
    return []


@contextlib.contextmanager
def _disk_errors(path: Path, what: str) -> Iterator[None]:
    """Failures of the disk as errors that name the key."""
    try:
        yield
    except OSError as error:
        raise DiskError(f"{what}: {error.strerror or error}", where=KEY, value=str(path), remedy=REMEDY) from error
    except SafetensorError as error:
        raise DiskError(f"{what}: {error}", where=KEY, value=str(path), remedy=REMEDY) from error


class ScratchFolder:
    """A folder of this process's own inside `path`, locked while it lives. Clears away those of processes that were killed."""

    def __init__(self, path: Path, part: str) -> None:
        with _disk_errors(path, "the folder cannot be made"):
            path.mkdir(parents=True, exist_ok=True)
            for left in path.glob(f"tuner-{part}-*"):
                _remove_abandoned(left)
            self.path = Path(tempfile.mkdtemp(prefix=f"tuner-{part}-", dir=path))
            # Locked before it has the name that others look for, so that nobody takes it for abandoned.
            new = self.path / f"{LOCK}-new"
            self._lock = os.open(new, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            with contextlib.suppress(OSError):  # a file system without locks: what a killed process leaves stays there
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                new.rename(self.path / LOCK)

    def close(self) -> None:
        """Removes the files; tensors that are mapped from them stay readable."""
        _remove(self.path)
        os.close(self._lock)


def _remove_abandoned(folder: Path) -> None:
    with contextlib.suppress(OSError):
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
        finally:
            os.close(lock)


def _remove(folder: Path) -> None:
    """Only what a session writes: somebody else's file keeps the folder."""
    for name in (*folder.glob("block-*.safetensors*"), folder / LOCK, folder / f"{LOCK}-new"):
        name.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


@dataclass(frozen=True)
class Piece:
    """A tensor's bytes: where they lie in the file and where in a slot."""

    file_offset: int
    offset: int
    size: int


class BlockFile:
    """The weights of one block on disk, as tensors with the names they have in the module."""

    def __init__(self, path: Path, parcel: Parcel) -> None:
        self.path = path
        with _disk_errors(path, "a block cannot be written"):
            self._write(parcel)
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
            mapped = mmap.mmap(self._file, 0)
        header = int.from_bytes(mapped[:8], "little")
        places = {name: entry["data_offsets"][0] for name, entry in json.loads(mapped[8 : 8 + header]).items()}
        flat = torch.frombuffer(mapped, dtype=torch.uint8, offset=8 + header)
        self.parameters: Mapping[str, nn.Parameter] = parcel.parameters(flat, places)
        leaves = parcel.packing.leaves
        self._pieces = [Piece(8 + header + places[leaf.name], leaf.offset, leaf.size) for leaf in leaves if leaf.size]

    def _write(self, parcel: Parcel) -> None:
        """Under another name first: a file with its final name is whole."""
        new = self.path.with_name(f"{self.path.name}.new")
        save_file(parcel.packing.plain(parcel.held()), new)
        new.replace(self.path)

    def read(self, into: memoryview) -> None:
        """Fills a packing's memory from the file. Raises `DiskError`."""
        with _disk_errors(self.path, "a block cannot be read"):
            for piece in self._pieces:
                done = 0
                while done < piece.size:
                    target = into[piece.offset + done : piece.offset + piece.size]
                    count = os.preadv(self._file, [target], piece.file_offset + done)
                    if not count:
                        raise OSError("the file ended early")
                    done += count

    def close(self) -> None:
        os.close(self._file)


class DiskStore(Store):
    """One file a block in a folder inside `path`."""

    capturable = False

    def __init__(self, link: Link, path: Path, part: str) -> None:
        self._link = link
        self._folder = ScratchFolder(path, part)
        self._files: dict[int, BlockFile] = {}

    def keep(self, index: int, parcel: Parcel) -> Mapping[str, nn.Parameter]:
        problems = folder_problem(self._folder.path, parcel.size)
        if problems:
            raise problems[0]
        file = BlockFile(self._folder.path / f"block-{index:04d}.safetensors", parcel)
        self._files[index] = file
        return file.parameters

    def feed(self, slots: Sequence[Slot], layout: Layout) -> Feed:
        units = [[(offset, self._files[index]) for offset, index in places] for places in layout]
        return DiskFeed(self._link, slots, units)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()
        self._folder.close()


class DiskFeed(Feed):
    """Reads units in the order in which they are sent for, at most two ahead of the copies."""

    def __init__(self, link: Link, slots: Sequence[Slot], units: Sequence[Sequence[tuple[int, BlockFile]]]) -> None:
        self._link = link
        self._units = units
        self._staging = [HostArena(max(slot.memory.numel() for slot in slots), "the buffers for reading") for _ in range(STAGING)]
        self._views = [memoryview(arena.buffer) for arena in self._staging]
        pinned = [arena.register(link) for arena in self._staging]
        if not all(pinned):
            log.warning(pageable_notice(KEY, sum(arena.memory.numel() for arena in self._staging)))
        self._copies = [[self._copies_of(slots[unit % len(slots)], arena.memory) for unit in range(len(units))] for arena in self._staging]
        self._last: list[Slot | None] = [None] * STAGING
        self._turn = 0
        self._coming: dict[int, Future[None]] = {}
        self._reader = ThreadPoolExecutor(1, "weights from disk")

    def _copies_of(self, slot: Slot, staging: Tensor) -> Copies:
        return slot.copies([(0, staging[: slot.memory.numel()])])

    def send(self, unit: int, slot: Slot) -> None:
        self._coming[unit] = self._reader.submit(self._bring, unit, slot)

    def arrived(self, unit: int) -> None:
        if (coming := self._coming.pop(unit, None)) is not None:
            coming.result()

    def drain(self) -> None:
        for coming in self._coming.values():
            coming.cancel()
        wait(self._coming.values())
        self._coming.clear()

    def close(self) -> None:
        self._reader.shutdown()
        self._views.clear()
        for arena in self._staging:
            arena.close()

    def _bring(self, unit: int, slot: Slot) -> None:
        """In the thread: reads `unit` once its staging buffer has been copied from, and issues its copy."""
        turn, self._turn = self._turn, (self._turn + 1) % STAGING
        if (last := self._last[turn]) is not None:
            self._link.settle(last)
        for offset, file in self._units[unit]:
            file.read(self._views[turn][offset:])
        self._link.load(slot, self._copies[turn][unit])
        self._last[turn] = slot
