"""A part some of whose blocks are streamed: the session behind group offload and block swap.

Blocks that belong to a unit live in a store (host memory or disk) from the moment they are read; the others lie on the device. From
`attach` on the modules hold parameters that are views of the ring's slots, made once: a step replaces no parameter and allocates nothing.
Between steps those views hold whatever the ring holds, so who wants to read weights calls `materialize` first.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.memory import MemorySession
from tuner.model.reading import allocate
from tuner_offload.arena import HostArena, Parcel, aligned, move_buffers
from tuner_offload.ring import ArenaFeed, Feed, Ring
from tuner_offload.transfer import Link, Slot, pageable_notice

log = logging.getLogger(__name__)

Units = tuple[tuple[int, ...], ...]
"""Of each unit, the consecutive blocks that travel together; in order."""
Layout = Sequence[Sequence[tuple[int, int]]]
"""Of each unit, (offset in its slot, index of the block)."""


class Store(ABC):
    """Where streamed blocks lie while they are not on the device."""

    capturable: bool = True

    def reserve(self, index: int, parcel: Parcel) -> Mapping[str, nn.Parameter]:
        """Parameters over memory for block `index`, which is about to be read into them; empty: read it elsewhere and give it to `keep`."""
        return {}

    @abstractmethod
    def keep(self, index: int, parcel: Parcel) -> Mapping[str, nn.Parameter]:
        """Takes the bytes of block `index`; returns parameters over where they lie now."""

    @abstractmethod
    def feed(self, slots: Sequence[Slot], layout: Layout) -> Feed:
        """What brings the units into the slots; unit u is wanted in slot u % R only."""

    @abstractmethod
    def close(self) -> None:
        """The bytes stay where parameters still hold them; nothing else does."""


class HostStore(Store):
    """One page-locked arena a block. `key`: the option to name when host memory is short."""

    def __init__(self, link: Link, key: str) -> None:
        self._link = link
        self._key = key
        self._arenas: dict[int, HostArena] = {}
        self._pageable = 0

    def reserve(self, index: int, parcel: Parcel) -> Mapping[str, nn.Parameter]:
        arena = self._arenas[index] = HostArena(parcel.size, f"the streamed blocks ({self._key})")
        return parcel.parameters(arena.memory)

    def keep(self, index: int, parcel: Parcel) -> Mapping[str, nn.Parameter]:
        arena = self._arenas.get(index)
        if arena is None or not parcel.lies_in(arena.memory):
            arena = HostArena(parcel.size, f"the streamed blocks ({self._key})")
            parcel.write(arena.memory)
        if not arena.register(self._link):
            self._pageable += parcel.size
        self._arenas[index] = arena
        return parcel.parameters(arena.memory)

    def feed(self, slots: Sequence[Slot], layout: Layout) -> Feed:
        if self._pageable:
            log.warning(pageable_notice(self._key, self._pageable))
        copies = [
            slots[unit % len(slots)].copies([(offset, self._arenas[index].memory) for offset, index in places])
            for unit, places in enumerate(layout)
        ]
        return ArenaFeed(self._link, copies)

    def close(self) -> None:
        for arena in self._arenas.values():
            arena.close()
        self._arenas.clear()


@dataclass
class KeptBlock:
    """A streamed block: its packing, and its parameters over the store and over its slot."""

    parcel: Parcel
    stored: Mapping[str, nn.Parameter]
    on_device: Mapping[str, nn.Parameter]
    """Empty before `attach`."""


class StreamedBlocks(MemorySession):
    """Streams `units` of a part's blocks through `slots` slots; blocks of no unit stay on the device."""

    def __init__(self, units: Units, slots: int, link: Link, store: Store) -> None:
        self.capturable = store.capturable
        self.link = link
        self._units = units
        self._slots = slots
        self._store = store
        self._unit_of = {index: unit for unit, blocks in enumerate(units) for index in blocks}
        self._kept: dict[int, KeptBlock] = {}
        self._ring: Ring | None = None
        self._first_backward = 0
        self._materialized = False

    # --- before the first pass -----------------------------------------------------------------------------------
    def expect(self, index: int, block: nn.Module, device: torch.device) -> None:
        if index in self._unit_of:
            parcel = Parcel(block)
            parcel.put(self._store.reserve(index, parcel))
        else:
            allocate(block, device)

    def receive(self, index: int, block: nn.Module, device: torch.device) -> None:
        if index in self._unit_of:
            self._keep(index, Parcel(block))
            move_buffers(block, device)
        else:
            block.to(device)

    def attach(self, blocks: BlockSet) -> None:
        for index in self._unit_of:
            if index not in self._kept:  # a model that was loaded elsewhere
                block = blocks.blocks[index]
                self._keep(index, Parcel(block, lambda name, parameter: not parameter.requires_grad))
                move_buffers(block, self.link.device)
        layout = [self._places(blocks) for blocks in self._units]
        sizes = [sum(aligned(self._kept[index].parcel.size) for index in blocks) for blocks in self._units]
        slots = [self.link.slot(max(sizes[place :: self._slots])) for place in range(self._slots)]
        for unit, places in enumerate(layout):
            for offset, index in places:
                kept = self._kept[index]
                kept.on_device = kept.parcel.parameters(slots[unit % len(slots)].memory[offset : offset + kept.parcel.size])
        self._ring = Ring(self.link, self._store.feed(slots, layout), slots, len(self._units))
        self._put_on_device()

    def _keep(self, index: int, parcel: Parcel) -> None:
        stored = self._store.keep(index, parcel)
        parcel.put(stored)
        self._kept[index] = KeptBlock(parcel, stored, {})

    def _places(self, blocks: Sequence[int]) -> list[tuple[int, int]]:
        """(offset in the slot, block) side by side."""
        found, offset = [], 0
        for index in blocks:
            found.append((offset, index))
            offset += aligned(self._kept[index].parcel.size)
        return found

    def _put_on_device(self) -> None:
        for kept in self._kept.values():
            kept.parcel.put(kept.on_device)

    def _put_stored(self) -> None:
        for kept in self._kept.values():
            kept.parcel.put(kept.stored)

    # --- a pass --------------------------------------------------------------------------------------------------
    def begin_step(self, first_backward: int) -> None:
        ring = self._attached()
        if self._materialized:
            self._put_on_device()
            # Who had the weights in hand may have changed them, as a merge does.
            ring.forget()
            self._materialized = False
        self._first_backward = first_backward
        ring.begin(next((unit for unit, blocks in enumerate(self._units) if blocks[-1] >= first_backward), len(self._units)))

    def before_forward(self, index: int) -> None:
        if index in self._unit_of:
            self._attached().acquire(self._unit_of[index])

    def after_forward(self, index: int) -> None:
        unit = self._unit_of.get(index)
        if unit is not None and index == self._units[unit][-1]:
            self._attached().release(unit, backward=False)

    def before_backward(self, index: int) -> None:
        if index < self._first_backward:  # another pass began between this one's forward and backward
            self._first_backward = 0
            self._attached().lower(0)
        self.before_forward(index)

    def after_backward(self, index: int) -> None:
        unit = self._unit_of.get(index)
        if unit is not None and index == max(self._units[unit][0], self._first_backward):
            self._attached().release(unit, backward=True)

    def end_step(self) -> None:
        self._attached().end()

    def abort(self) -> None:
        if self._ring is not None:
            self._ring.forget()

    def _attached(self) -> Ring:
        if self._ring is None:
            raise RuntimeError("a pass began before the blocks were attached, or after they were detached")
        return self._ring

    # --- between passes ------------------------------------------------------------------------------------------
    def materialize(self) -> None:
        self._put_stored()
        self._materialized = True

    def stats(self) -> Mapping[str, float]:
        """`loads` of units, those of them that came late (`misses`), `bytes` to the device, `waits` of computation for a load."""
        ring = self._ring
        counts = {"loads": ring.loads, "misses": ring.misses} if ring is not None else {}
        return {**counts, "bytes": self.link.bytes, "waits": self.link.waits}

    def detach(self) -> None:
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        self._put_stored()
        self._kept.clear()
        self._store.close()

