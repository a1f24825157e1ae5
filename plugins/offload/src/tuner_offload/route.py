"""In which order layers are wanted: learned by watching, never assumed.

A guess that is wrong costs time and nothing else: the ring then loads the layer when it is asked for.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

KNOWN_ORDERS = 8
"""How many orders of passes are remembered: training and sampling, with and without sound, and some to spare."""


class Route(ABC):
    """Foretells which layers come after the ones that have come. Layers are numbers; the same one twice in a row counts once."""

    def begin(self, kind: int) -> None:
        """A pass of this kind starts; passes of a kind tend to be alike."""

    @abstractmethod
    def follow(self, layer: int) -> None:
        """`layer` is wanted now."""

    @abstractmethod
    def ahead(self, count: int) -> Sequence[int]:
        """Up to `count` layers that are expected next."""

    def end(self) -> None:
        """The pass was completed."""

    def forget(self) -> None:
        """The pass was broken off: what it was like says nothing."""


class PassRoute(Route):
    """Passes with a start and an end: the whole order of a pass is remembered, and followed by the next of its kind.

    Where a pass deviates, another remembered order that began in the same way is taken; else the place where the wanted layer comes
    next in the present one. Between passes nothing is expected.
    """

    def __init__(self) -> None:
        self._known: list[tuple[int, tuple[int, ...]]] = []
        """(kind, order), the last used first."""
        self._order: tuple[int, ...] = ()
        self._next = 0
        self._seen: list[int] = []
        self._kind: int | None = None

    def begin(self, kind: int) -> None:
        self._kind, self._next, self._seen = kind, 0, []
        self._order = next((order for known, order in self._known if known == kind), ())

    def follow(self, layer: int) -> None:
        if self._kind is None:
            return
        if self._next >= len(self._order) or self._order[self._next] != layer:
            self._deviate(layer)
        else:
            self._next += 1
        self._seen.append(layer)

    def _deviate(self, layer: int) -> None:
        begun = (*self._seen, layer)
        for _, order in sorted(self._known, key=lambda known: known[0] != self._kind):  # those of this kind first
            if order[: len(begun)] == begun:
                self._order, self._next = order, len(begun)
                return
        if layer in self._order[self._next :]:
            self._next = self._order.index(layer, self._next) + 1

    def ahead(self, count: int) -> Sequence[int]:
        return self._order[self._next : self._next + count] if self._kind is not None else ()

    def end(self) -> None:
        if self._kind is not None:
            learned = (self._kind, tuple(self._seen))
            self._known = [learned, *(order for order in self._known if order != learned)][:KNOWN_ORDERS]
        self.forget()

    def forget(self) -> None:
        self._kind, self._order, self._seen = None, (), []


class LoopRoute(Route):
    """A network that runs again and again, nobody says when: after a layer comes the one that came after it the last time."""

    def __init__(self) -> None:
        self._after: dict[int, int] = {}
        self._last: int | None = None

    def follow(self, layer: int) -> None:
        if self._last is not None:
            self._after[self._last] = layer
        self._last = layer

    def ahead(self, count: int) -> Sequence[int]:
        found: list[int] = []
        layer = self._last
        while len(found) < count and layer is not None:
            layer = self._after.get(layer)
            if layer is None or layer in found:  # a network smaller than the ring
                break
            found.append(layer)
        return found

    def forget(self) -> None:
        self._last = None
