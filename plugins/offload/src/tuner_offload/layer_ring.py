"""Slots for single layers: what is used now, and those that will be used next, already on their way.

Slots are taken in turn, so with K slots one layer is in use and K - 1 are loaded or loading. A slot is refilled when the layer after it is
asked for; the copy waits on the device for the product that used the slot, the host for nothing. Each pass starts at slot 0, so that
equal passes use equal addresses, as a captured graph needs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from tuner_offload.arena import Parcel
from tuner_offload.route import Route
from tuner_offload.transfer import Copies, Link, Slot


@dataclass
class StoredLayer:
    """A layer's frozen weights in host memory, and its parameters over any slot, made when they are first needed there."""

    parcel: Parcel
    memory: Tensor
    """Flat uint8 in host memory."""
    stored: Mapping[str, nn.Parameter]
    """Views of `memory`: what the module holds while it is not used."""
    copies: dict[int, Copies] = field(default_factory=dict)
    """By number of the slot."""
    on_device: dict[int, Mapping[str, nn.Parameter]] = field(default_factory=dict)


class LayerRing:
    """`slots` pieces of device memory, each as large as the largest of `layers`."""

    def __init__(self, link: Link, layers: Sequence[StoredLayer], slots: int, route: Route) -> None:
        self.link = link
        self.route = route
        self.layers = layers
        largest = max((layer.parcel.size for layer in layers), default=0)
        self.slots: tuple[Slot, ...] = tuple(link.slot(largest) for _ in range(slots)) if layers else ()
        self.late = 0
        """How many loads were issued only when the layer was wanted."""
        self._coming: deque[tuple[int, int]] = deque()
        """(layer, slot) that were sent for and not yet asked for, in order."""
        self._held: tuple[int, int] | None = None
        """The layer asked for last, and its slot; it stays there until another is asked for."""
        self._turn = 0

    def begin(self, kind: int) -> None:
        """A pass starts."""
        self._clear()
        self.link.fork()
        self.route.begin(kind)
        self._send_ahead()

    def end(self) -> None:
        """The pass is over."""
        self.route.end()
        self._clear()
        self.link.join()

    def forget(self) -> None:
        """After an exception: nothing is on its way, and every layer is loaded anew."""
        self.link.drain()
        self.route.forget()
        self._clear()

    def acquire(self, layer: int) -> Mapping[str, nn.Parameter]:
        """What is computed from here on may read these parameters of `layer`, until it is released."""
        if self._held is None or self._held[0] != layer:
            self._held = self._fetch(layer)
        slot = self._held[1]
        self.link.use(self.slots[slot])
        self._send_ahead()
        return self._parameters(layer, slot)

    def release(self, layer: int) -> None:
        """All that reads `layer` has been issued."""
        if self._held is not None and self._held[0] == layer:
            self.link.release(self.slots[self._held[1]])

    def close(self) -> None:
        """Gives the slots back."""
        self.forget()
        self.link.close()
        self.slots = ()

    def _fetch(self, layer: int) -> tuple[int, int]:
        self.route.follow(layer)
        if self._coming and self._coming[0][0] == layer:
            return self._coming.popleft()
        # Not what was expected: what is on its way is of no use, and the slots behind the last used one are taken again.
        self._turn -= len(self._coming)
        self._coming.clear()
        self.late += 1
        return layer, self._send(layer)

    def _send_ahead(self) -> None:
        """Sends for the next layers of the route, as far as slots are free."""
        room = len(self.slots) - 1
        for layer in self.route.ahead(room)[len(self._coming) :]:
            self._coming.append((layer, self._send(layer)))

    def _send(self, layer: int) -> int:
        number = self._turn % len(self.slots)
        self._turn += 1
        stored = self.layers[layer]
        slot = self.slots[number]
        if number not in stored.copies:
            stored.copies[number] = slot.copies([(0, stored.memory)])
        self.link.load(slot, stored.copies[number])
        return number

    def _parameters(self, layer: int, number: int) -> Mapping[str, nn.Parameter]:
        stored = self.layers[layer]
        if number not in stored.on_device:
            stored.on_device[number] = stored.parcel.parameters(self.slots[number].memory[: stored.parcel.size])
        return stored.on_device[number]

    def _clear(self) -> None:
        self._coming.clear()
        self._held = None
        self._turn = 0
