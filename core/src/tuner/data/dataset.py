"""The training set: which clips make which batch of which epoch, and their records.

The plan of an epoch is a pure function of (seed, epoch): no state is kept, so a run resumes at any step, and neither worker threads
nor the number of processes change the order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from tuner.data.manifest import Manifest
from tuner.data.randomness import uniform
from tuner.data.records import RecordPlaces
from tuner.errors import DataError
from tuner.interfaces.encoders import LatentEncoder
from tuner.interfaces.family import Sample


@dataclass(frozen=True)
class Draw:
    """One clip's turn in an epoch."""

    item: int
    """Index in the items."""
    repeat: int
    """0 .. repeats."""
    position: int
    """In the epoch's order: the counter of random draws for this turn."""


class TrainingSet:
    """The items of a manifest, whose records are in the cache.

    `encoders` are asked for their settings only; their weights are not loaded. `caption_dropout`: the probability that a draw is
    trained with the empty caption.
    """

    def __init__(
        self, manifest: Manifest, encoders: Sequence[LatentEncoder], batch_size: int, seed: int, caption_dropout: float = 0.0
    ) -> None:
        if not manifest.items:
            raise DataError("the training set is empty", where="datasets")
        self.items = manifest.items
        self._manifest = manifest
        self._places = RecordPlaces(encoders, manifest.geometry, manifest.text_cache)
        self._batch_size = batch_size
        self._seed = seed
        self._dropout = caption_dropout
        self._planned: tuple[int, list[tuple[Draw, ...]]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Batches an epoch; the same for every epoch."""
        return self._manifest.batches_per_epoch(self._batch_size)

    def digest(self) -> str:
        """Identity of what is trained on, in its order: clips, captions, and the encoders that they went through."""
        parts = [self._manifest.digest(), {name: dict(settings) for name, settings in self._places.identities().items()}]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def epoch_plan(self, epoch: int) -> list[tuple[Draw, ...]]:
        """The batches of an epoch, each of one group. Each item comes repeats + 1 times; a group's incomplete last batch is kept.

        Draws are sorted by a number that depends on (seed, epoch, item, repeat) alone, then cut into batches, which are sorted likewise.
        """
        planned = self._planned  # read once: the prefetch thread may be in the next epoch already
        if planned is None or planned[0] != epoch:
            planned = self._planned = (epoch, self._plan(epoch))
        return planned[1]

    def _plan(self, epoch: int) -> list[tuple[Draw, ...]]:
        groups: dict[object, list[tuple[int, int]]] = {}
        for number, item in enumerate(self.items):
            groups.setdefault(item.group, []).extend((number, repeat) for repeat in range(item.repeats + 1))
        batches: list[list[tuple[int, int]]] = []
        for turns in groups.values():
            turns.sort(key=lambda turn: uniform(self._seed, "order", epoch, *turn))
            batches += [turns[start : start + self._batch_size] for start in range(0, len(turns), self._batch_size)]
        batches.sort(key=lambda batch: uniform(self._seed, "batches", epoch, *batch[0]))
        position = count()
        return [tuple(Draw(item, repeat, next(position)) for item, repeat in batch) for batch in batches]

    def locate(self, step: int) -> tuple[int, int]:
        """(epoch, index) of the batch number `step`, counted from 0 over all epochs."""
        return divmod(step, self.steps_per_epoch)

    def load(self, epoch: int, draws: Sequence[Draw]) -> list[Sample]:
        """Reads the records of one batch. Raises `MissingRecord`."""
        return [self._sample(epoch, draw) for draw in draws]

    def _sample(self, epoch: int, draw: Draw) -> Sample:
        item = self.items[draw.item]
        dropped = uniform(self._seed, "caption dropout", epoch, draw.item, draw.repeat) < self._dropout
        caption = "" if dropped else item.caption
        return Sample(
            key=item.key, dataset=item.dataset, draw=draw.position, epoch=epoch, frame_rate=item.frame_rate, frames=item.bucket.frames,
            height=item.bucket.height, width=item.bucket.width, records=self._places.read(item, caption), caption=caption,
            kind=item.kind, seconds=item.seconds, first_frame=item.first_frame,
        )  # fmt: skip
