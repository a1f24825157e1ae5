"""The ring's order, for every small ring: nothing comes late, and a step loads no more than the bound."""

from __future__ import annotations

import itertools

import pytest
import torch

from offload.simulated import SimulatedLink
from tuner_offload.ring import ArenaFeed, Ring

RINGS = [(units, slots) for units in range(1, 8) for slots in range(1, units + 1)]


class Recording(SimulatedLink):
    """A device in the middle of a graph capture, where `recording` says so."""

    recording = False

    @property
    def capturing(self) -> bool:
        return self.recording


def ring_of(units: int, slots: int) -> tuple[Ring, SimulatedLink]:
    """Unit u holds the byte u."""
    link = Recording()
    made = [link.slot(4) for _ in range(slots)]
    copies = [made[unit % slots].copies([(0, torch.full((4,), unit, dtype=torch.uint8))]) for unit in range(units)]
    return Ring(link, ArenaFeed(link, copies), made, units), link


def visit(ring: Ring, unit: int, *, backward: bool) -> None:
    ring.acquire(unit)
    assert ring.slots[unit % len(ring.slots)].memory.tolist() == [unit] * 4
    ring.release(unit, backward=backward)


def step(ring: Ring, low: int, *, end: bool = True) -> int:
    """One pass with backward down to `low`; returns how many units were loaded."""
    before = ring.loads
    ring.begin(low)
    for unit in range(ring.units):
        visit(ring, unit, backward=False)
    for unit in reversed(range(low, ring.units)):
        visit(ring, unit, backward=True)
    if end:
        ring.end()
    return ring.loads - before


@pytest.mark.parametrize(("units", "slots"), RINGS)
def test_a_step_loads_what_it_must_and_nothing_late(units: int, slots: int) -> None:
    ring, _ = ring_of(units, slots)
    assert step(ring, 0) == units + (units - slots)
    for low in [0, 0, *range(units + 1), 0]:
        # Forward keeps what backward wants first; where backward ends early, or never comes, the way back to the start is loaded.
        assert step(ring, low) <= 2 * (units - slots)
        assert ring.resident() == list(range(slots))
    assert step(ring, 0) == 2 * (units - slots) and step(ring, units) == 2 * (units - slots) - max(0, units - 2 * slots)
    assert ring.misses == 0


def test_any_other_order_is_right_too() -> None:
    ring, _ = ring_of(5, 2)
    for order in itertools.islice(itertools.permutations(range(5)), 0, 120, 7):
        ring.begin(0)
        for unit in order:
            visit(ring, unit, backward=unit % 2 == 0)
    step(ring, 2, end=False)
    step(ring, 0)
    assert step(ring, 0) == 6


def test_a_unit_that_was_not_released_is_not_overwritten() -> None:
    ring, _ = ring_of(3, 1)
    ring.begin(0)
    ring.acquire(0)
    with pytest.raises(RuntimeError, match="unit 1 is wanted while unit 0 is in use"):
        ring.acquire(1)
    ring.forget()
    assert ring.resident() == [] and step(ring, 0) == 5


def test_what_is_recorded_is_not_there_until_it_has_run() -> None:
    ring, link = ring_of(5, 2)
    assert isinstance(link, Recording)
    step(ring, 0)
    visit_out_of_order = [4, 3]
    ring.begin(0)
    for unit in visit_out_of_order:
        visit(ring, unit, backward=False)
    ring.end()
    link.recording = True
    # Units in their own places may be relied on; the others are brought by the graph itself.
    inside = ring.resident().count(0) + ring.resident().count(1)
    assert step(ring, 0) == 6 + (2 - inside)
    link.recording = False
    assert len(ring.resident()) == inside
    assert step(ring, 0) == 6 + (2 - inside) and step(ring, 0) == 6
