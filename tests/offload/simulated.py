"""A device that copies late: it finds every use of weights that are not there, and every overwriting of weights that are in use."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from tuner_offload.transfer import Copies, Link, Slot

GARBAGE = 0xFF
"""A byte that makes NaN of any floating-point number."""


class SimulatedLink(Link):
    """Copies only when somebody waits for them; a slot that is loading, or used by nobody, holds garbage.

    Raises AssertionError for a load into a slot in use and for the use of a slot that was never loaded.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self._lock = threading.RLock()  # copies may be issued by a thread that reads
        self._pending: dict[int, Copies] = {}
        self._content: dict[int, Tensor] = {}
        self._in_use: set[int] = set()

    def slot(self, size: int) -> Slot:
        slot = super().slot(size)
        slot.incoming.fill_(GARBAGE)
        return slot

    def _place(self, slot: Slot) -> int:
        return next(index for index, other in enumerate(self.slots) if other is slot)

    def _copy(self, slot: Slot, copies: Copies) -> None:
        place = self._place(slot)
        assert place not in self._in_use, f"slot {place} is overwritten while it is in use"
        slot.incoming.fill_(GARBAGE)
        self._content.pop(place, None)
        self._pending[place] = copies

    def _perform(self, slot: Slot) -> None:
        """The copies that are pending arrive."""
        with self._lock:
            copies = self._pending.pop(self._place(slot), None)
            if copies is None:
                return
            for target, source in copies:
                assert target.numel() == source.numel() and target.dtype == source.dtype == torch.uint8
                target.copy_(source)
            self._content[self._place(slot)] = slot.incoming.clone()
            slot.incoming.fill_(GARBAGE)

    def use(self, slot: Slot) -> None:
        super().use(slot)
        place = self._place(slot)
        if place in self._in_use:
            return
        self._perform(slot)
        assert place in self._content or not slot.memory.numel(), f"slot {place} is used before anything was loaded"
        slot.incoming.copy_(self._content[place])
        self._in_use.add(place)

    def _free(self, slot: Slot) -> None:
        place = self._place(slot)
        assert place in self._in_use, f"slot {place} is released without having been used"
        self._in_use.discard(place)
        slot.incoming.fill_(GARBAGE)

    def fork(self) -> None:
        super().fork()
        assert not self._in_use, "a step begins while slots are in use"

    def join(self) -> None:
        super().join()
        for slot in self.slots:
            self._perform(slot)

    def drain(self) -> None:
        super().drain()
        self._in_use.clear()
        for slot in self.slots:
            self._perform(slot)

    def settle(self, slot: Slot) -> None:
        self._perform(slot)
