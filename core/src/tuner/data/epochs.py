"""Which item makes which batch of which epoch: a pure function of (seed, epoch), so a run resumes at any step, and neither worker
threads nor the number of processes change the order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from tuner.data.items import Group, Item
from tuner.data.randomness import uniform

Turn = tuple[int, int]
"""(index of the item, 0 .. repeats)."""


@dataclass(frozen=True)
class Draw:
    """One item's turn in an epoch."""

    item: int
    """Index in the items."""
    repeat: int
    """0 .. repeats."""
    position: int
    """In the epoch's order: the counter of random draws for this turn."""


def plan_epoch(items: Sequence[Item], batch_size: int, seed: int, epoch: int) -> list[tuple[Draw, ...]]:
    """The batches of an epoch, each of one group. Each item comes repeats + 1 times, or its entry's share of that; a group's incomplete
    last batch is kept.

    Draws are sorted by a number that depends on (seed, epoch, item, repeat) alone, then cut into batches, which are sorted likewise.
    """
    batches: list[list[Turn]] = []
    for sources in _turns(items).values():
        turns = [turn for source in sources.values() for turn in _share(items, source, seed, epoch)]
        turns.sort(key=lambda turn: uniform(seed, "order", epoch, *turn))
        batches += [turns[start : start + batch_size] for start in range(0, len(turns), batch_size)]
    batches.sort(key=lambda batch: uniform(seed, "batches", epoch, *batch[0]))
    position = count()
    return [tuple(Draw(item, repeat, next(position)) for item, repeat in batch) for batch in batches]


def batches_per_epoch(items: Sequence[Item], batch_size: int) -> int:
    """How many batches `plan_epoch` makes: the same number for every epoch."""
    return sum(group.batches for group in group_turns(items, batch_size))


@dataclass(frozen=True)
class GroupTurns:
    """One group in an epoch."""

    group: Group
    items: int
    turns: int
    batches: int
    last: int
    """Items in the last batch, which may be incomplete."""


def group_turns(items: Sequence[Item], batch_size: int) -> list[GroupTurns]:
    """The groups of `plan_epoch`, those with most turns first."""
    groups = []
    for group, sources in _turns(items).items():
        turns = sum(_taken(items, source) for source in sources.values())
        batches = -(-turns // batch_size)
        count = sum(repeat == 0 for source in sources.values() for _, repeat in source)
        groups.append(GroupTurns(group, count, turns, batches, turns - (batches - 1) * batch_size))
    return sorted(groups, key=lambda group: -group.turns)


def sound_share(items: Sequence[Item], batch_size: int, seed: int) -> float:
    """Share of the first epoch's batches in which at least one sample has sound."""
    batches = plan_epoch(items, batch_size, seed, 0)
    return sum(any(items[draw.item].has_audio for draw in batch) for batch in batches) / len(batches) if batches else 0.0


def _turns(items: Sequence[Item]) -> Mapping[Group, Mapping[tuple[str, float], list[Turn]]]:
    """Group -> entry -> all turns of its items. (Items of one entry have one probability.)"""
    groups: dict[Group, dict[tuple[str, float], list[Turn]]] = {}
    for number, item in enumerate(items):
        turns = groups.setdefault(item.group, {}).setdefault((item.dataset, item.probability), [])
        turns.extend((number, repeat) for repeat in range(item.repeats + 1))
    return groups


def _taken(items: Sequence[Item], turns: Sequence[Turn]) -> int:
    """How many turns of one entry and group an epoch takes: their share, at least one, so that none is left out for ever."""
    return max(1, round(items[turns[0][0]].probability * len(turns)))


def _share(items: Sequence[Item], turns: Sequence[Turn], seed: int, epoch: int) -> list[Turn]:
    """The turns of one entry and group in this epoch: a window that moves over a fixed random order and begins again at its end, so that
    all have had their turn after as few epochs as possible."""
    taken = _taken(items, turns)
    if taken == len(turns):
        return list(turns)
    order = sorted(turns, key=lambda turn: uniform(seed, "rotation", *turn))
    first = epoch * taken
    return [order[(first + offset) % len(order)] for offset in range(taken)]
