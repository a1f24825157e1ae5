"""Bytes of safetensors files straight to where they will live: into host memory, or through page-locked pieces to a device.

Special here: nothing is memory-mapped. A system counts a mapping that may be written to as memory, so that a 43 GB checkpoint could not
even be opened on a machine with less; and a mapping is read page by page by whoever touches it, where a few threads that read large
pieces keep a disk, the page cache and the link to a device busy. What lies side by side in a file is read with one call.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from tuner.errors import CheckpointError
from tuner.model.stored import StoredTensor

PIECE: Final = 8 << 20
"""Bytes read with one call. From 4 MiB on copies to a device run at the link's full speed."""
THREADS: Final = 8
"""Copying out of the page cache takes a core about 10 GB/s, a link takes 50."""
_BUFFERS: Final = 1024
"""The most that one call may fill (IOV_MAX of Linux)."""
DTYPES: Final = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
"""safetensors' names."""


def dtype_of(stored: StoredTensor) -> torch.dtype:
    """What a tensor is stored in. Raises `CheckpointError` for a dtype that is not known."""
    if stored.header.dtype not in DTYPES:
        raise CheckpointError("its dtype is not known", where=stored.key, value=stored.header.dtype)
    return DTYPES[stored.header.dtype]


def read_into(wanted: Iterable[tuple[StoredTensor, Tensor]]) -> None:
    """Fills each tensor with the bytes that are stored for it: contiguous, of as many bytes, on any device.

    Copies to a CUDA device are queued on its current stream; everything else is there on return. Raises `CheckpointError`.
    """
    by_device: dict[torch.device, list[tuple[StoredTensor, Tensor]]] = {}
    for stored, target in wanted:
        by_device.setdefault(target.device, []).append((stored, target))
    for device, tensors in by_device.items():
        pieces = list(_pieces(tensors))
        with _Files() as files, ThreadPoolExecutor(THREADS, "reading") as threads:
            if device.type == "cpu":
                for done in [threads.submit(files.read, piece, piece.views()) for piece in pieces]:
                    done.result()
            else:
                staged(pieces, device, files.read, threads)


# --- pieces ------------------------------------------------------------------------------------------------------
@dataclass
class Piece:
    """Consecutive bytes of a file, and the memory that they are for: flat uint8, one after the other, on one device."""

    file: Path
    start: int
    targets: list[Tensor] = field(default_factory=list)
    size: int = 0

    def views(self) -> list[memoryview]:
        """Of host memory."""
        return [target.numpy().data for target in self.targets]


Read = Callable[[Piece, list[memoryview]], None]
"""Fills buffers one after the other with a piece's bytes."""


def _pieces(wanted: Sequence[tuple[StoredTensor, Tensor]]) -> Iterator[Piece]:
    """In the order of the files: large tensors in several, small ones that lie side by side in one."""
    current: Piece | None = None
    for stored, target in sorted(wanted, key=lambda pair: (str(pair[0].file), pair[0].start)):
        flat = target.detach().view(-1).view(torch.uint8)
        if flat.numel() != stored.end - stored.start:
            raise ValueError(f"{stored.key}: {stored.end - stored.start} bytes are stored, {flat.numel()} are asked for")
        for offset in range(0, flat.numel(), PIECE):
            part, start = flat[offset : offset + PIECE], stored.start + offset
            joins = current is not None and current.file == stored.file and current.start + current.size == start
            if current is None or not joins or current.size + part.numel() > PIECE:
                if current is not None:
                    yield current
                current = Piece(stored.file, start)
            current.targets.append(part)
            current.size += part.numel()
    if current is not None:
        yield current


class _Files(ExitStack):
    """Files opened once, read from any thread."""

    def __init__(self) -> None:
        super().__init__()
        self._opened: dict[Path, int] = {}

    def read(self, piece: Piece, buffers: list[memoryview]) -> None:
        """Raises `CheckpointError`."""
        try:
            _read(self._descriptor(piece.file), piece.start, buffers)
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"cannot be read: {reason}", where=piece.file.name, remedy="download it again") from error

    def _descriptor(self, file: Path) -> int:
        if file not in self._opened:  # two threads may open a file twice: both are closed
            self._opened[file] = descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            self.callback(os.close, descriptor)
        return self._opened[file]


def _read(descriptor: int, start: int, buffers: list[memoryview]) -> None:
    """Fills all buffers, however little a call brings."""
    left = list(buffers)
    while left:
        done = os.preadv(descriptor, left[:_BUFFERS], start)
        if not done:
            raise OSError("the file ended early")
        start += done
        while left and done >= len(left[0]):
            done -= len(left.pop(0))
        if done:
            left[0] = left[0][done:]


# --- to a device -------------------------------------------------------------------------------------------------
class _Staging:
    """Page-locked memory for one piece on its way to a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._memory = torch.empty(PIECE, dtype=torch.uint8, pin_memory=self._cuda)
        self._copied = torch.cuda.Event() if self._cuda else None  # type: ignore[no-untyped-call]

    def fill(self, read: Read, piece: Piece) -> None:
        """In a thread: waits until what was here before has been copied, then reads."""
        if self._copied is not None:
            with torch.cuda.device(self._device):  # a thread begins on the first device, where other processes may compute
                self._copied.synchronize()
        read(piece, [self._memory[: piece.size].numpy().data])

    def send(self, piece: Piece) -> None:
        """Copies what was read to the device, on its current stream."""
        offset = 0
        for target in piece.targets:
            target.copy_(self._memory[offset : offset + target.numel()], non_blocking=self._cuda)
            offset += target.numel()
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._device))


def staged(pieces: Sequence[Piece], device: torch.device, read: Read, threads: ThreadPoolExecutor) -> None:
    """Reads the next pieces in `threads` while those before are copied to `device`, in order."""
    ring = itertools.cycle([_Staging(device) for _ in range(min(2 * THREADS, len(pieces)))])
    coming: deque[tuple[_Staging, Piece, Future[None]]] = deque()

    def send_first() -> None:
        staging, piece, filled = coming.popleft()
        filled.result()
        staging.send(piece)

    for piece in pieces:
        if len(coming) == 2 * THREADS:  # the next place in the ring is that of the first piece
            send_first()
        staging = next(ring)
        coming.append((staging, piece, threads.submit(staging.fill, read, piece)))
    while coming:
        send_first()


# --- modules without memory --------------------------------------------------------------------------------------
def cast_empty(module: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and buffers of floating-point numbers that are on the meta device are of `dtype` from now on."""
    for owner, table, name, tensor in _tensors(module):
        if tensor.is_meta and tensor.is_floating_point():
            _put(owner, table, name, torch.empty_like(tensor, dtype=dtype))


def allocate(module: nn.Module, device: torch.device) -> None:
    """Gives parameters and buffers on the meta device memory on `device`."""
    for owner, table, name, tensor in _tensors(module):
        if tensor.is_meta:
            _put(owner, table, name, torch.empty_like(tensor, device=device))


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
    """Each place of a tensor in `module`: owner, table of the owner, name there."""
    for owner in module.modules():
        for table in ("_parameters", "_buffers"):
            for name, tensor in list(getattr(owner, table).items()):
                if tensor is not None:
                    yield owner, table, name, tensor


def _put(owner: nn.Module, table: str, name: str, tensor: Tensor) -> None:
    getattr(owner, table)[name] = nn.Parameter(tensor, requires_grad=False) if table == "_parameters" else tensor


def memory_for(module: nn.Module, names: Iterable[str], dtype: Callable[[str], torch.dtype], device: torch.device) -> dict[str, Tensor]:
    """The module's parameters and buffers called `names`, to be filled: what has no memory is given some on `device`, in `dtype(name)`."""
    found: dict[str, Tensor] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        table = "_parameters" if leaf in owner._parameters else "_buffers"
        tensor = getattr(owner, table)[leaf]
        if tensor.is_meta:
            _put(owner, table, leaf, torch.empty(tensor.shape, dtype=dtype(name), device=device))
        found[name] = getattr(owner, table)[leaf]
    return found
