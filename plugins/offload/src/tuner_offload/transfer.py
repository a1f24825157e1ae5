"""The way of weights from the host to the device: the one place that knows copy streams, events and pinned memory.

A `Link` copies into `Slot`s, flat pieces of device memory that are made once and stay where they are. The life of a slot within a
step is load, use, release, load, ...: computation waits for the load that it uses, a load waits for the computation that released
the slot. All of these waits are events on the device; the host waits for nothing but in `settle` and `drain`. Nothing is ever copied back.

Copies go through `Slot.incoming`, an alias of the slot's memory with a version counter of its own: the graph of a block that is not
recomputed holds views of the slot, and autograd would take a copy into them for a mistake. It is none, because whoever walks that graph
back first has the same bytes loaded into the same slot again.

A step on a CUDA device may be captured as one graph: `fork` takes the copy stream into the capture and `join` brings it back, and between
the two only events of the same step are waited for. Forward and backward captured apart cannot be: the copy stream would stay outside.
"""

from __future__ import annotations

import contextlib
import logging
import resource
import weakref
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

log = logging.getLogger(__name__)

PINNED_SPEED = 50e9
"""Bytes a second from registered host memory over PCIe 5 x16: on an H200 51-55 GB/s for copies of 4 MiB and more, 33 for 256 KiB."""
PAGEABLE_SPEED = 8.6e9
"""The same from memory that is not registered."""

Copies = Sequence[tuple[Tensor, Tensor]]
"""(target inside `Slot.incoming`, source in host memory) pairs of equal size, flat uint8."""


class Slot:
    """Device memory for one unit of weights at a time. Only a link changes it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        """Flat uint8 on the device: what parameters are views of."""
        self.incoming = memory.data
        """The same bytes under another version counter: what copies write to."""
        self.loading = False
        """A load was issued that computation has not waited for."""
        self.released = False
        """Released since the last fork: a load must wait."""

    def copies(self, pieces: Sequence[tuple[int, Tensor]]) -> Copies:
        """What `Link.load` takes, from (offset in the slot, flat uint8 host tensor) pairs; make it once, not in every step."""
        return tuple((self.incoming[offset : offset + piece.numel()], piece) for offset, piece in pieces)


class Link(ABC):
    """The way to one device. Counters: `loads`, `bytes` (to the device), `waits` (of computation for a load)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.slots: list[Slot] = []
        self.loads = 0
        self.bytes = 0
        self.waits = 0

    def slot(self, size: int) -> Slot:
        """New device memory of `size` bytes."""
        slot = Slot(torch.empty(size, dtype=torch.uint8, device=self.device))
        self.slots.append(slot)
        return slot

    def load(self, slot: Slot, copies: Copies) -> None:
        """Fills `slot` as soon as it is free; returns at once where the device copies by itself."""
        self.loads += 1
        self.bytes += sum(source.numel() for _, source in copies)
        self._copy(slot, copies)
        slot.loading = True

    def use(self, slot: Slot) -> None:
        """What is computed from here on finds what was loaded last."""
        if slot.loading:
            self.waits += 1
            self._wait(slot)
            slot.loading = False

    def release(self, slot: Slot) -> None:
        """What has been computed so far was the last to read the slot; its content stays until the next load."""
        slot.released = True
        self._free(slot)

    def fork(self) -> None:
        """Start of a step: copies come after everything computed so far."""
        for slot in self.slots:
            slot.released = False
            # Whoever starts a capture has waited for the device before, and may not wait inside for what was issued outside.
            slot.loading &= not self.capturing

    def join(self) -> None:
        """End of a step: what is computed from here on comes after all copies."""
        for slot in self.slots:
            slot.loading = False

    def drain(self) -> None:
        """The host waits until no copy is under way. All slots are free afterwards, whatever they hold."""
        for slot in self.slots:
            slot.loading = slot.released = False

    def settle(self, slot: Slot) -> None:
        """The host waits for the last load of `slot`, so that its source may be overwritten."""

    def close(self) -> None:
        """Gives the device memory back, as far as nobody else holds it."""
        self.drain()
        self.slots.clear()

    @property
    def pins(self) -> bool:
        """Whether copies from registered host memory are faster."""
        return False

    @property
    def capturing(self) -> bool:
        """Whether what is issued now is recorded into a graph in place of being run."""
        return False

    @abstractmethod
    def _copy(self, slot: Slot, copies: Copies) -> None:
        """Issues the copies, after the slot's release."""

    def _wait(self, slot: Slot) -> None:
        """Lets computation wait for the slot's last load."""

    def _free(self, slot: Slot) -> None:
        """Marks the point in the computation after which the slot may be overwritten."""


class HostLink(Link):
    """The device is the processor: copies are made at once."""

    def _copy(self, slot: Slot, copies: Copies) -> None:
        for target, source in copies:
            target.copy_(source)


class SlotEvents:
    """The two events of a slot, recorded again and again: its last load is done, its last use is done."""

    def __init__(self) -> None:
        self.loaded = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self.freed = torch.cuda.Event()  # type: ignore[no-untyped-call]


class CudaLink(Link):
    """Copies on a stream of their own beside the computation, or with `stream=False` in line with it."""

    def __init__(self, device: torch.device, *, stream: bool = True) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device) if stream else None  # type: ignore[no-untyped-call]
        self._events: dict[int, SlotEvents] = {}
        self._forked, self._joined = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]

    def slot(self, size: int) -> Slot:
        slot = super().slot(size)
        self._events[id(slot)] = SlotEvents()
        return slot

    def _copy(self, slot: Slot, copies: Copies) -> None:
        if self._stream is None:
            for target, source in copies:
                target.copy_(source, non_blocking=True)
            self._events[id(slot)].loaded.record(self._current())
            return
        events = self._events[id(slot)]
        if slot.released:
            self._stream.wait_event(events.freed)
        with torch.cuda.stream(self._stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)
        events.loaded.record(self._stream)

    def _wait(self, slot: Slot) -> None:
        if self._stream is not None:
            self._current().wait_event(self._events[id(slot)].loaded)

    def _free(self, slot: Slot) -> None:
        if self._stream is not None:
            self._events[id(slot)].freed.record(self._current())

    def fork(self) -> None:
        super().fork()
        if self._stream is not None:
            self._forked.record(self._current())
            self._stream.wait_event(self._forked)

    def join(self) -> None:
        super().join()
        if self._stream is not None:
            self._joined.record(self._stream)
            self._current().wait_event(self._joined)

    def drain(self) -> None:
        super().drain()
        if not self.capturing:
            (self._stream or self._current()).synchronize()
        elif self._forked_in_capture():
            # Nothing has run, so there is nothing to wait for; but a capture cannot be ended while this stream is away in it.
            with contextlib.suppress(RuntimeError):  # one that was invalidated takes nothing more
                self.join()

    def _forked_in_capture(self) -> bool:
        if self._stream is None:
            return False
        with torch.cuda.stream(self._stream):
            return torch.cuda.is_current_stream_capturing()

    def settle(self, slot: Slot) -> None:
        self._events[id(slot)].loaded.synchronize()

    def close(self) -> None:
        super().close()
        if not self.capturing:
            self._current().synchronize()  # the memory is used on two streams: none may still read it when it is given back
        self._events.clear()

    @property
    def pins(self) -> bool:
        return True

    @property
    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def _current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)


def link_to(device: torch.device, *, stream: bool = True) -> Link:
    """The link for `device`; `stream`: copies beside the computation where the device can do that."""
    return CudaLink(device, stream=stream) if device.type == "cuda" else HostLink(device)


class Registration:
    """Host memory that a link may copy from directly. Closed, it is ordinary memory again, also where nobody closed it.

    The driver does not notice that memory is given back: what is mapped at the same place next would count as registered and be refused.
    """

    def __init__(self, link: Link, memory: Tensor) -> None:
        self._memory: Tensor | None = None
        if link.pins and memory.numel() and _register(link.device, memory):
            self._memory = memory
            self._undo = weakref.finalize(self, _unregister, memory.data_ptr())
            self._undo.atexit = False  # the process takes its registrations along, and the runtime may be gone by then

    @property
    def pinned(self) -> bool:
        """Whether it worked."""
        return self._memory is not None

    def close(self) -> None:
        """Nothing may be copying from it any more."""
        if self._memory is not None:
            self._undo()
            self._memory = None


def _unregister(address: int) -> None:
    torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]


def _register(device: torch.device, memory: Tensor) -> bool:
    """Page-locks memory as it is. torch's own pinned allocator would round 772 MB up to 1 GiB and copy."""
    with torch.cuda.device(device):
        runtime = torch.cuda.cudart()  # type: ignore[no-untyped-call]
        failed = int(runtime.cudaHostRegister(memory.data_ptr(), memory.numel(), 0))
        if failed:
            # The runtime remembers the failure and would report it after the next kernel, which has nothing to do with it.
            with contextlib.suppress(RuntimeError):
                torch.zeros(1, device=device).add_(1)
    return not failed


def pageable_notice(key: str, size: int) -> str:
    """What the user is told where host memory could not be registered; `size` in bytes."""
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    why = "" if limit == resource.RLIM_INFINITY else f" (ulimit -l is {limit / 2**20:,.0f} MiB)"
    return (
        f"{key}: {size / 1e9:.1f} GB of host memory could not be page-locked{why}; copies to the device run at about "
        f"{PAGEABLE_SPEED / 1e9:.0f} GB/s in place of {PINNED_SPEED / 1e9:.0f} and beside no computation"
    )
