"""A part whose layers are streamed one by one: the session behind RamTorch and leaf-level group offload, and behind whole modules held.

Special here: nothing depends on blocks. A layer fetches its weights whenever it computes, in forward, in recomputation and for the gradient
of its input, so events of blocks are not needed; the start and the end of a pass only tell when to look ahead. In between, modules hold
their weights in host memory, so saving and merging find them there at any time.

Per pass with every block recomputed each layer is loaded three times. The last layer of a block's recomputation is the first whose gradient
is wanted, and stays; so does a layer that is used twice in a row.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

import torch
from torch import Tensor, nn

from tuner.interfaces.blocks import BlockSet
from tuner.interfaces.memory import MemorySession
from tuner.model.reading import allocate
from tuner_offload.arena import HostArena, Packing, Parcel, aligned
from tuner_offload.layer_ring import LayerRing, StoredLayer
from tuner_offload.layers import is_streamable, stream
from tuner_offload.route import LoopRoute, PassRoute, Route
from tuner_offload.transfer import Link, pageable_notice

log = logging.getLogger(__name__)

SLOTS: Final = 4
"""One layer in use, three on their way: copies of small layers overlap the product of a large one, and the other way round."""
SMALLEST: Final = 64 * 1024
"""Bytes below which a layer stays on the device: a copy of 64 KiB takes a few microseconds whatever its size."""


@dataclass(frozen=True)
class Candidate:
    """A layer that could be streamed."""

    name: str
    """Inside its block."""
    size: int
    """Bytes of its weight, which decide; the bias travels along."""
    layer: nn.Module | None = None
    """None where only sizes are known."""


Choice = Callable[[int, Sequence[Candidate]], Sequence[Candidate]]
"""(index of the block, or -1 for a module without blocks; its candidates in order) -> those that are streamed. Asked block by block."""


def every_layer(index: int, candidates: Sequence[Candidate]) -> Sequence[Candidate]:
    """All of them."""
    return candidates


@dataclass(frozen=True)
class _Room:
    """Where the chosen layers of a module will lie."""

    arena: HostArena | None
    """None: none is chosen."""
    layers: tuple[tuple[nn.Module, StoredLayer], ...]


class LeafSession(MemorySession):
    """Streams the large linear layers and convolutions of a part through `SLOTS` slots, or one by one in line without `stream`."""

    inside_blocks = True

    def __init__(self, link: Link, key: str, *, stream: bool, choose: Choice = every_layer, smallest: int = SMALLEST) -> None:
        """`key`: the option that notices and errors name; `smallest`: bytes from which on a layer is streamed."""
        self.link = link
        self._slots = slots_of(stream)
        self._key = key
        self._choose = choose
        self._smallest = smallest
        self._layers: list[tuple[nn.Module, StoredLayer]] = []
        self._seen: set[int] = set()
        self._expected: dict[int, _Room] = {}
        self._arenas: list[HostArena] = []
        self._pageable = 0
        self._ring: LayerRing | None = None
        self._undo: list[Callable[[], None]] = []

    # --- before the first pass -----------------------------------------------------------------------------------
    def expect(self, index: int, block: nn.Module, device: torch.device) -> None:
        self._expected[index] = room = self._room_for(index, block, trained=True)
        for _, stored in room.layers:
            stored.parcel.put(stored.stored)
        allocate(block, device)

    def receive(self, index: int, block: nn.Module, device: torch.device) -> None:
        self._keep(index, block, device, trained=True)

    def attach(self, blocks: BlockSet) -> None:
        for index, block in enumerate(blocks.blocks):
            if index not in self._seen:  # a model that was loaded elsewhere
                self._keep(index, block, self.link.device, trained=True)
        self._start(PassRoute())

    def hold(self, module: nn.Module, device: torch.device) -> None:
        self._keep(-1, module, device, trained=False)
        self._start(LoopRoute())
        # Slots may lie where other tensors were a moment ago, which computation has yet to read.
        self.link.fork()

    def _keep(self, index: int, module: nn.Module, device: torch.device, *, trained: bool) -> None:
        """Takes the chosen layers of `module` to host memory and everything else in it to `device`."""
        self._seen.add(index)
        room = self._expected.pop(index, None) or self._room_for(index, module, trained=trained)
        streamed = {id(layer) for layer, _ in room.layers}
        for owner in module.modules():
            _move_own(owner, device, parameters=id(owner) not in streamed)
        for layer, stored in room.layers:
            if not stored.parcel.lies_in(stored.memory):
                stored.parcel.write(stored.memory)
            stored.parcel.put(stored.stored)
            self._layers.append((layer, stored))
        if room.arena is not None:
            if not room.arena.register(self.link):
                self._pageable += room.arena.memory.numel()
            self._arenas.append(room.arena)

    def _room_for(self, index: int, module: nn.Module, *, trained: bool) -> _Room:
        """Host memory for the chosen layers of `module`."""
        chosen = self._chosen(index, module, trained=trained)
        parcels = [Parcel(layer) for layer in chosen]
        if not parcels:
            return _Room(None, ())
        arena = HostArena(sum(aligned(parcel.size) for parcel in parcels), f"the streamed layers ({self._key})")
        layers, offset = [], 0
        for layer, parcel in zip(chosen, parcels, strict=True):
            memory = arena.memory[offset : offset + parcel.size]
            layers.append((layer, StoredLayer(parcel, memory, parcel.parameters(memory))))
            offset += aligned(parcel.size)
        return _Room(arena, tuple(layers))

    def _chosen(self, index: int, module: nn.Module, *, trained: bool) -> list[nn.Module]:
        found = candidates(module, trained=trained, smallest=self._smallest)
        return [chosen.layer for chosen in self._choose(index, found) if chosen.layer is not None]

    def _start(self, route: Route) -> None:
        if self._pageable:
            log.warning(pageable_notice(self._key, self._pageable))
        self._ring = LayerRing(self.link, [stored for _, stored in self._layers], self._slots, route)
        self._undo = [stream(layer, self._ring, number) for number, (layer, _) in enumerate(self._layers)]

    # --- a pass --------------------------------------------------------------------------------------------------
    def begin_step(self, first_backward: int) -> None:
        self._attached().begin(first_backward)

    def end_step(self) -> None:
        self._attached().end()

    def abort(self) -> None:
        if self._ring is not None:
            self._ring.forget()

    def _attached(self) -> LayerRing:
        if self._ring is None:
            raise RuntimeError("a pass began before the layers were attached, or after they were detached")
        return self._ring

    # --- between passes ------------------------------------------------------------------------------------------
    def stats(self) -> Mapping[str, float]:
        """`loads` of layers, those of them issued only when the layer was wanted (`misses`), `bytes` to the device, `waits`."""
        late = self._ring.late if self._ring is not None else 0
        return {"loads": self.link.loads, "misses": late, "bytes": self.link.bytes, "waits": self.link.waits}

    def detach(self) -> None:
        while self._undo:
            self._undo.pop()()
        if self._ring is not None:
            self._ring.close()
            self._ring = None
        for arena in self._arenas:
            arena.close()
        self._arenas.clear()
        self._layers.clear()
        self._expected.clear()


def _move_own(owner: nn.Module, device: torch.device, *, parameters: bool) -> None:
    """Brings what `owner` itself holds to `device`: buffers, and `parameters` if they do not live in host memory."""
    if parameters:
        owner._apply(lambda tensor: tensor.to(device), recurse=False)  # type: ignore[no-untyped-call]
        return
    for name, buffer in owner._buffers.items():
        if isinstance(buffer, Tensor):
            owner._buffers[name] = buffer.to(device)


def candidates(module: nn.Module, *, trained: bool, smallest: int = SMALLEST) -> list[Candidate]:
    """The layers of `module` that can be streamed and are worth it, in order; on the meta device too."""
    found = []
    for name, layer in module.named_modules():
        if is_streamable(layer, trained=trained):
            size = sum(leaf.size for leaf in Packing({"weight": cast(Tensor, layer.weight)}).leaves)
            if size >= smallest:
                found.append(Candidate(name, size, layer))
    return found


def slots_of(stream: bool) -> int:
    """How many layers have a place on the device at a time."""
    return SLOTS if stream else 1
