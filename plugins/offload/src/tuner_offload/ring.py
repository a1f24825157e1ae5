"""The ring: which unit is brought into which slot, and when.

Unit u of U always sits in slot u % R. A training step visits 0..U-1 and then U-1..low; as soon as a slot is released, the next unit of
that order which belongs to it is sent for. At the turn nothing moves, because the last R units are the first that backward wants, and at
the end units 0..R-1 are there for the next step. So every step begins and ends in the same state (which a captured graph needs), and a
step with full backward loads 2(U - R) units: the least that is possible with R slots.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

from tuner_offload.transfer import Copies, Link, Slot


class Feed(ABC):
    """Where the units come from."""

    @abstractmethod
    def send(self, unit: int, slot: Slot) -> None:
        """Starts to bring `unit` into `slot`, which is no longer used. Returns at once."""

    def arrived(self, unit: int) -> None:
        """The host waits until the link knows of the load of `unit`. Raises what went wrong."""

    def drain(self) -> None:
        """The host waits until nothing is on its way to the link; what goes wrong is forgotten."""

    def close(self) -> None:
        """Ends what runs beside; nothing is sent any more."""


class ArenaFeed(Feed):
    """Units that lie in host memory: the link copies them by itself."""

    def __init__(self, link: Link, copies: Sequence[Copies]) -> None:
        self._link = link
        self._copies = copies

    def send(self, unit: int, slot: Slot) -> None:
        self._link.load(slot, self._copies[unit])


class Ring:
    """R slots for U units. Units are acquired and released in whatever order; in that of a step they are there in time.

    `loads` counts the units sent for, `misses` those of them that were sent for only when they were needed.
    """

    def __init__(self, link: Link, feed: Feed, slots: Sequence[Slot], units: int) -> None:
        self.link = link
        self.feed = feed
        self.slots = tuple(slots)
        self.units = units
        self.loads = 0
        self.misses = 0
        self._content: list[int | None] = [None] * len(slots)
        self._held: int | None = None
        self._low = units
        self._before_capture: list[int | None] | None = None

    def begin(self, low: int) -> None:
        """A step starts whose backward visits units U-1..`low` (U: none)."""
        self._low = low
        self._held = None
        self._arrived()  # of a step that was left without its end
        self.link.fork()
        self._before_capture = None
        if self.link.capturing:
            # Recorded, not run: what is not in place now must be brought by the graph itself, and is not there until it has run.
            self._content = [held if held == home else None for home, held in enumerate(self._content)]
            self._before_capture = list(self._content)
        for home in range(len(self.slots)):
            self._send(home)

    def acquire(self, unit: int) -> None:
        """What is computed from here on may read `unit`, until it is released."""
        if self._held is not None and self._held != unit:
            raise RuntimeError(f"unit {unit} is wanted while unit {self._held} is in use")
        if self._send(unit):
            self.misses += 1
        self.feed.arrived(unit)
        self.link.use(self._slot(unit))
        self._held = unit

    def release(self, unit: int, *, backward: bool) -> None:
        """`unit` has been used; sends for the next one of its slot."""
        self._held = None
        self.link.release(self._slot(unit))
        self._send(self._next(unit, backward))

    def lower(self, low: int) -> None:
        """Backward visits units down to `low` after all."""
        self._low = low

    def end(self) -> None:
        """The step is over."""
        if self._held is not None:
            self.release(self._held, backward=True)
        for home in range(len(self.slots)):  # a pass that was not walked back as it had been said leaves others there
            self._send(home)
        self._arrived()
        self.link.join()
        if self._before_capture is not None:
            self._content, self._before_capture = self._before_capture, None

    def forget(self) -> None:
        """After an exception, or when other hands were in the slots: everything is loaded anew."""
        self.feed.drain()
        self.link.drain()
        self._content = [None] * len(self.slots)
        self._held = self._before_capture = None

    def close(self) -> None:
        """Gives the slots back."""
        self.forget()
        self.feed.close()
        self.link.close()

    def resident(self) -> list[int]:
        """The units that are in slots or on their way there, in the order of the slots."""
        return [unit for unit in self._content if unit is not None]

    def _arrived(self) -> None:
        for unit in self.resident():
            self.feed.arrived(unit)

    def _slot(self, unit: int) -> Slot:
        return self.slots[unit % len(self.slots)]

    def _next(self, unit: int, backward: bool) -> int:
        """The unit that the slot of `unit` is wanted for next."""
        ring = len(self.slots)
        if not backward and unit + ring < self.units:
            return unit + ring
        if not backward and unit >= self._low:
            return unit
        if backward and unit - ring >= self._low:
            return unit - ring
        return unit % ring

    def _send(self, unit: int) -> bool:
        """Sends for `unit` unless it is there; whether it did."""
        place = unit % len(self.slots)
        if self._content[place] == unit:
            return False
        self._content[place] = unit
        self.loads += 1
        self.feed.send(unit, self.slots[place])
        return True
